"""GPU kernels against torch, and the engine on the GPU against the engine on the CPU. Needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler import kernels
from fiddler.evaluation.perplexity import cut, measure
from fiddler.files.weights import ExpertWeights
from fiddler.gpu.layers import GpuLinear
from fiddler.loading import load
from fiddler.models.attention import attend
from fiddler.models.router import rms_norm
from fiddler.offload.feed_forward import Job, feed_forward
from fiddler.runtime.prefix_cache import common
from fiddler.telemetry.expert_counts import ExpertCounts
from oracles import synthetic

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
decode_kernels = pytest.importorskip("fiddler.gpu.decode_kernels")
expert_kernels = pytest.importorskip("fiddler.gpu.expert_kernels")
grouped_kernels = pytest.importorskip("fiddler.offload.grouped_kernels")

DEVICE = torch.device("cuda")
PROMPT = "Once upon a time, in a small village, there lived"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", [(50, 96), (6144, 4096), (7, 2050)])
def test_gemv_matches_float64(kind, rounded, shape):
    torch.manual_seed(0)
    x, w = torch.randn(1, shape[1], device=DEVICE), torch.randn(*shape, device=DEVICE).to(kind)
    inputs = x.to(kind) if rounded else x
    expected = inputs.double() @ w.double().T
    assert (decode_kernels.gemv(x, w, rounded=rounded) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="torch rounds sums before 2.8")
@pytest.mark.parametrize("tokens", [2, 100])
def test_linear_of_several_tokens_returns_float32_sums(tokens):
    torch.manual_seed(0)
    x, w = torch.randn(tokens, 512, device=DEVICE), torch.randn(300, 512, device=DEVICE).bfloat16()
    expected = x.bfloat16().double() @ w.double().T
    y = GpuLinear({"w": w}, decode_kernels, exact=False)(x, "w")
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(96, 200, 4), (4096, 14336, 2)])
@pytest.mark.parametrize("rounded", [False, True])
def test_expert_kernels_for_one_token_match_float64(size, rounded):
    torch.manual_seed(1)
    width, hidden, experts = size
    gate, up = (torch.randn(experts, hidden, width, device=DEVICE).bfloat16() / width**0.5 for _ in range(2))
    down = torch.randn(experts, width, hidden, device=DEVICE).bfloat16() / hidden**0.5
    x, routing_weights = torch.randn(1, width, device=DEVICE), torch.tensor([0.7, 0.3], device=DEVICE)
    variant = kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16" if rounded else "f32")
    stacks = [kernels.ExpertMatrices.of(each.view(torch.int16).cpu().numpy()) for each in (gate, up, down)]

    def naive(e, rows=slice(None)):
        inputs = x.bfloat16() if rounded else x
        h = F.silu(inputs.double() @ gate[e][rows].double().T) * (inputs.double() @ up[e][rows].double().T)
        h = h.float().bfloat16() if rounded else h
        return h.double() @ down[e][:, rows].double().T

    def job(e, rows=hidden, weight_index=0):
        return [gate[e].data_ptr(), up[e].data_ptr(), down[e].data_ptr(), rows, weight_index, 0]

    def run(jobs, expert_ids, into, add):
        table = torch.tensor(jobs, device=DEVICE)
        expert_ids = None if expert_ids is None else torch.tensor(expert_ids, device=DEVICE)
        expert_kernels.experts_of_one(
            x,
            table,
            routing_weights,
            hidden,
            ExpertWeights(*stacks, variant),
            expert_ids=expert_ids,
            into=into,
            add=add,
        )
        return into

    y = run([job(e) for e in range(experts)], [[experts - 1, 0]], torch.empty(1, width, device=DEVICE), False)
    expected = 0.7 * naive(experts - 1) + 0.3 * naive(0)
    scale = expected.abs().max()
    bound = (2e-3 if rounded else 1e-5) * scale  # a hidden value may round to the other side
    assert (y - expected).abs().max() <= bound
    absent = [job(e, hidden if e else 0) for e in range(experts)]
    y = run(absent, [[1, 0]], torch.ones(1, width, device=DEVICE), True)
    assert (y - 1 - 0.7 * naive(1)).abs().max() <= bound
    y = run([job(1, weight_index=1), [0] * 6], None, torch.zeros(1, width, device=DEVICE), True)
    assert (y - 0.3 * naive(1)).abs().max() <= bound


def test_norm_kernel_matches_torch():
    torch.manual_seed(2)
    for width in (4096, 90, 512):
        weight = torch.rand(width, device=DEVICE)
        for tokens in (1, 2, 40):
            h = torch.randn(tokens, width, device=DEVICE) * 3
            assert torch.allclose(decode_kernels.norm(h, weight, 1e-5), rms_norm(h, weight, 1e-5), atol=1e-5)


@pytest.mark.parametrize("n,total,dim", [(40, 40, 128), (40, 170, 128), (33, 100, 24), (5, 9, 20)])
def test_attention_over_a_float16_cache_is_close_to_float32(n, total, dim):
    torch.manual_seed(5)
    q, keys, values = (torch.randn(rows, heads, dim, device=DEVICE) for rows, heads in ((n, 6), (total, 2), (total, 2)))
    exact = attend(q, keys.half().float(), values.half().float(), None)
    assert (attend(q, keys.half(), values.half(), None) - exact).abs().max() < 5e-3


@pytest.mark.parametrize("shape", [(40, 96, 208, 4, 2), (150, 64, 96, 3, 1), (600, 512, 320, 8, 2), (3, 60, 100, 5, 3)])
def test_grouped_expert_kernels_match_torch_expert_by_expert(shape):
    torch.manual_seed(4)
    tokens, width, hidden, experts, k = shape
    gate, up = (torch.randn(experts, hidden, width, device=DEVICE).bfloat16() / width**0.5 for _ in range(2))
    down = torch.randn(experts, width, hidden, device=DEVICE).bfloat16() / hidden**0.5
    x = torch.randn(tokens, width, device=DEVICE).bfloat16()
    expert_ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(DEVICE)
    order = torch.argsort(expert_ids.reshape(-1), stable=True)
    token, routing_weights = order // k, torch.rand(tokens * k, device=DEVICE)
    first = [0, *torch.bincount(expert_ids.reshape(-1), minlength=experts).cumsum(0).tolist()]
    stacks = [kernels.ExpertMatrices.of(each.view(torch.int16).cpu().numpy()) for each in (gate, up, down)]
    weights = ExpertWeights(*stacks, kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16"))
    expected, jobs = torch.zeros(tokens, width, device=DEVICE), []
    for e in range(experts):
        rows = slice(first[e], first[e + 1])
        output = feed_forward(x[token[rows]].float(), gate[e], up[e], down[e], rounded=False, work=1 << 20)
        expected.index_add_(0, token[rows], output * routing_weights[rows, None])
        addresses = gate[e].data_ptr(), up[e].data_ptr(), down[e].data_ptr()
        jobs.append(Job(addresses, hidden, first[e], first[e + 1]))
    for workspace_bytes in (1 << 30, 2 * hidden * 20):
        y = torch.zeros(tokens, width, device=DEVICE)
        grouped = grouped_kernels.Grouped(DEVICE)
        grouped.experts_of_many(x, token, routing_weights, jobs, hidden, y, workspace_bytes, weights)
        assert (y - expected).norm() <= 3e-3 * expected.norm()
    pinned = torch.randn(tokens, width, pin_memory=True)
    before = y.clone()
    grouped_kernels.Grouped(DEVICE).add_from_host(y, pinned)
    assert torch.equal(y, before + pinned.to(DEVICE))


@pytest.fixture(scope="module")
def tokens():
    return fiddler.load(device="cpu").tokenizer.encode(PROMPT, add_bos=True)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("residents", [0, 5, None])
@pytest.mark.parametrize("missing", ["auto", "cpu", "stream"])
def test_logits_on_the_gpu_match_those_of_the_cpu(precision, residents, missing, tokens):
    expected = load(device="cpu", precision=precision).logits(tokens)
    engine = load(device="cuda", precision=precision, gpu_experts=residents, missing=missing)
    logits = engine.logits(tokens)
    bound = 1e-4 if precision == "exact" else 3e-2
    assert (logits - expected).norm() <= bound * expected.norm()
    # token by token, through the captured graphs
    sequence = engine.runner.sequence()
    by_token = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in tokens])
    assert (by_token - expected).norm() <= bound * expected.norm()


def test_greedy_text_is_the_same_on_cpu_and_gpu_and_both(tokens):
    greedy = fiddler.Sampling(temperature=0.0)
    texts = {
        name: load(precision="exact", **options).generate(PROMPT, greedy, 60).text
        for name, options in {
            "cpu": {"device": "cpu"},
            "both": {"device": "cuda", "gpu_experts": 7},
            "streamed": {"device": "cuda", "gpu_experts": 7, "missing": "stream"},
            "gpu": {"device": "cuda"},
        }.items()
    }
    assert len(set(texts.values())) == 1, texts


def test_greedy_text_in_fast_precision_differs_only_where_two_tokens_are_close(tokens):
    """Closer than rounding moves them, router decisions included. Prints where, and how close (`pytest -rP`)."""
    greedy, count = fiddler.Sampling(temperature=0.0), 200
    exact = load(device="cpu", precision="exact")
    expected = exact.generate(tokens, greedy, count, ignore_eos=True).tokens
    for options in ({"device": "cpu"}, {"device": "cuda", "gpu_experts": 7}, {"device": "cuda"}):
        engine = load(precision="fast", **options)
        generated = engine.generate(tokens, greedy, count, ignore_eos=True).tokens
        same = common(expected, generated)
        if same == count:
            sys.stdout.write(f"{options}: {count} tokens the same\n")
            continue
        sequence = engine.runner.sequence()
        rounded = engine.runner.prefill(sequence, tokens)
        for token in expected[:same]:  # as it was generated
            rounded = engine.runner.step([(sequence, [token])]).logits[0]
        logits = exact.logits([*tokens, *expected[:same]])[-1]
        margin, error = float(logits[expected[same]] - logits[generated[same]]), float((rounded - logits).abs().max())
        difference = f"{same} of {count} tokens the same, then two {margin:.4f} apart; logits differ by {error:.4f}"
        sys.stdout.write(f"{options}: {difference}\n")
        assert 0 <= margin <= 2 * error


def test_without_a_c_compiler_single_tokens_go_through_torch(tokens, tmp_path):
    """In a new process that finds no C compiler, and no launcher that Triton built before."""
    code = (
        "import sys, fiddler\n"
        "say = lambda text: print(text, file=sys.stderr)\n"
        "e = fiddler.load(device='cuda', precision='exact', gpu_experts=5, notify=say)\n"
        "print(e.generate(sys.argv[1], fiddler.Sampling(temperature=0.0), 20).text)\n"
    )
    hidden = {**os.environ, "PATH": str(tmp_path), "CC": "", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run([sys.executable, "-c", code, PROMPT], env=hidden, capture_output=True, text=True, check=True)
    assert "slower way through torch" in done.stderr
    greedy = fiddler.load(device="cpu", precision="exact").generate(PROMPT, fiddler.Sampling(temperature=0.0), 20)
    assert done.stdout.rstrip("\n") == greedy.text


def test_weights_go_through_bounce_buffers_where_the_mapping_cannot_be_pinned(tokens, monkeypatch):
    monkeypatch.setattr("fiddler.device.pinned_mapping.available_memory", lambda: 1 << 20)
    monkeypatch.setattr("fiddler.device.pinned_mapping.cached_bytes", lambda address, nbytes: 0)
    expected = load(device="cpu", precision="exact").logits(tokens)
    for missing in ("auto", "stream"):
        notices = []
        engine = load(device="cuda", precision="exact", gpu_experts=5, missing=missing, notify=notices.append)
        assert any("reading through buffers" in line for line in notices)
        assert (engine.logits(tokens) - expected).norm() <= 1e-4 * expected.norm()
        sequence = engine.runner.sequence()
        by_token = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in tokens])
        assert (by_token - expected).norm() <= 1e-4 * expected.norm()


def test_two_sequences_at_once_give_the_logits_of_one_alone(tokens):
    """The graphs serve both, one after the other."""
    engine = load(device="cuda", precision="exact", gpu_experts=5)
    expected = engine.logits(tokens)
    a, b = engine.runner.sequence(), engine.runner.sequence()
    engine.runner.step([(a, tokens[:3])])
    engine.runner.step([(b, tokens[:5])])
    for sequence, begin in ((a, 3), (b, 5)):
        logits = engine.runner.step([(sequence, tokens[begin : begin + 1])]).logits[0]
        assert torch.allclose(logits, expected[begin], atol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"dtype": "f16", "window": 20},
        {"experts": 7, "used": 3, "f": 100, "d": 60, "heads": 3, "kv_heads": 1},
        {"tied": True, "head_dim": 24, "f": 320},
        {"dense_dtype": "f32"},
        {"dense_dtype": "f16", "layers": 3},
    ],
    ids=str,
)
def test_logits_of_random_models_match_those_of_the_cpu(model, tmp_path):
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", **model)
    ids = np.random.default_rng(0).integers(3, 200, 60).tolist()
    expected = load(path, "cpu", precision="exact").logits(ids)
    engine = load(path, "cuda", precision="exact", gpu_experts=3)
    assert (engine.logits(ids) - expected).norm() <= 1e-4 * expected.norm()
    sequence = engine.runner.sequence()
    engine.runner.prefill(sequence, ids[:30])
    by_token = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in ids[30:]])
    assert (by_token - expected[30:]).norm() <= 1e-4 * expected.norm()


def test_perplexity_and_expert_counts_match_those_of_the_cpu(tmp_path):
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", experts=5, used=3)
    ids = np.random.default_rng(1).integers(3, 200, 1200).tolist()
    recorders = [ExpertCounts(2, 5) for _ in range(4)]
    engines = [load(path, "cpu", precision="exact", recorder=recorders[0])]
    for residents, recorder in zip((0, 4, None), recorders[1:], strict=True):
        engines.append(load(path, "cuda", precision="exact", gpu_experts=residents, recorder=recorder))
    for size in (65, 500):  # first several windows a step; then one
        results = []
        for engine, recorder in zip(engines, recorders, strict=True):
            *_, result = measure(engine.runner, cut(ids, size), 1)
            results.append((result.perplexity, recorder.counts))  # of both sizes so far
        for perplexity, counts in results[1:]:
            assert perplexity == pytest.approx(results[0][0], rel=1e-4)
            assert counts == results[0][1]

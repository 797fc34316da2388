"""What needs a GPU: kernels for one token against torch, and the whole engine there against the one on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler.evaluation.perplexity import cut, measure
from fiddler.gpu.layers import GpuLinear
from fiddler.loading import load
from fiddler.models.attention import attend
from fiddler.models.rotary import rotate
from fiddler.models.router import route
from fiddler.offload.feed_forward import Job, feed_forward
from fiddler.runtime.prefix_cache import common
from fiddler.telemetry.expert_counts import counting
from oracles import synthetic

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
decode_kernels = pytest.importorskip("fiddler.gpu.decode_kernels")
expert_kernels = pytest.importorskip("fiddler.gpu.expert_kernels")
attention_kernels = pytest.importorskip("fiddler.gpu.attention_kernels")
grouped_kernels = pytest.importorskip("fiddler.offload.grouped_kernels")

DEVICE = torch.device("cuda")
PROMPT = "Once upon a time, in a small village, there lived"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", [(50, 96), (6144, 4096), (7, 2050)])
def test_gemv(kind, rounded, shape):
    torch.manual_seed(0)
    x, w = torch.randn(1, shape[1], device=DEVICE), torch.randn(*shape, device=DEVICE).to(kind)
    given = x.to(kind) if rounded else x
    expected = given.double() @ w.double().T
    assert (decode_kernels.gemv(x, w, rounded=rounded) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="torch rounds sums before 2.8")
@pytest.mark.parametrize("tokens", [2, 100])
def test_products_of_several_tokens_keep_their_sums(tokens):
    torch.manual_seed(0)
    x, w = torch.randn(tokens, 512, device=DEVICE), torch.randn(300, 512, device=DEVICE).bfloat16()
    expected = x.bfloat16().double() @ w.double().T
    made = GpuLinear({"w": w}, decode_kernels, exact=False)(x, "w")
    assert made.dtype == torch.float32
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(96, 200, 4), (4096, 14336, 2)])
@pytest.mark.parametrize("rounded", [False, True])
def test_experts_of_one_token(size, rounded):
    torch.manual_seed(1)
    width, hidden, experts = size
    gate, up = (torch.randn(experts, hidden, width, device=DEVICE).bfloat16() / width**0.5 for _ in range(2))
    down = torch.randn(experts, width, hidden, device=DEVICE).bfloat16() / hidden**0.5
    x, shares = torch.randn(1, width, device=DEVICE), torch.tensor([0.7, 0.3], device=DEVICE)

    def naive(e, rows=slice(None)):
        given = x.bfloat16() if rounded else x
        made = F.silu(given.double() @ gate[e][rows].double().T) * (given.double() @ up[e][rows].double().T)
        made = made.float().bfloat16() if rounded else made
        return made.double() @ down[e][:, rows].double().T

    def job(e, rows=hidden, share=0):
        return [gate[e].data_ptr(), up[e].data_ptr(), down[e].data_ptr(), rows, share]

    def run(jobs, ids, into, add):
        table = torch.tensor(jobs, device=DEVICE)
        ids = None if ids is None else torch.tensor(ids, device=DEVICE)
        expert_kernels.experts_of_one(
            x,
            table,
            shares,
            hidden,
            torch.bfloat16,
            expert_ids=ids,
            into=into,
            add=add,
            rounded=rounded,
            even=hidden % 16 == 0,
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
    y = run([job(1, share=1), [0] * 5], None, torch.zeros(1, width, device=DEVICE), True)
    assert (y - 0.3 * naive(1)).abs().max() <= bound


def test_norms_and_routes_as_torch_does():
    torch.manual_seed(2)
    for experts, k, width in ((8, 2, 4096), (5, 3, 90), (64, 6, 512)):
        w, norm = torch.randn(experts, width, device=DEVICE), torch.rand(width, device=DEVICE)
        for tokens in (1, 1, 1, 2, 40):
            h = torch.randn(tokens, width, device=DEVICE) * 3
            made, expected = decode_kernels.route(h, norm, 1e-5, w, k), route(h, norm, 1e-5, w, k)
            assert (made[1] == expected[1]).all()
            assert torch.allclose(made[0], expected[0], atol=1e-5)
            assert torch.allclose(made[2], expected[2], atol=1e-4)
            assert torch.allclose(decode_kernels.norm(h, norm, 1e-5), expected[0], atol=1e-5)
    _, ids, shares = decode_kernels.route(torch.full((1, 512), torch.nan, device=DEVICE), norm, 1e-5, w, 6)
    assert ids.max() < 64
    assert shares.isnan().any()


@pytest.mark.parametrize("width", [96, 4096])
def test_what_passes_between_the_two_sides(width):
    x, shares, ids = torch.randn(1, width, device=DEVICE), torch.rand(1, 3, device=DEVICE), [[7, 0, 200]]
    prefix_cache, seen = torch.zeros(width + 3, device=DEVICE), torch.zeros(width + 6, pin_memory=True)
    decode_kernels.hand_over(x, torch.tensor(ids, device=DEVICE), shares, prefix_cache, seen)
    torch.cuda.synchronize()
    assert torch.equal(prefix_cache, torch.cat([x, shares], 1)[0])
    assert torch.equal(seen, torch.cat([x.cpu(), torch.tensor(ids).float(), shares.cpu()], 1)[0])
    h, y, made = torch.randn(1, width, device=DEVICE), torch.randn(1, width, device=DEVICE), torch.randn(1, width)
    assert torch.equal(decode_kernels.gather(h, y, made.pin_memory()), h + y + made.to(DEVICE))


@pytest.mark.parametrize("n,total,dim", [(40, 40, 128), (40, 170, 128), (33, 100, 24), (5, 9, 20)])
def test_attention_in_16_bits(n, total, dim):
    torch.manual_seed(5)
    q, keys, values = (torch.randn(rows, heads, dim, device=DEVICE) for rows, heads in ((n, 6), (total, 2), (total, 2)))
    exact = attend(q, keys.half().float(), values.half().float(), None)
    assert (attend(q, keys.half(), values.half(), None) - exact).abs().max() < 5e-3


@pytest.mark.parametrize("shape", [(40, 96, 208, 4, 2), (150, 64, 96, 3, 1), (600, 512, 320, 8, 2), (3, 60, 100, 5, 3)])
def test_experts_of_many_tokens(shape):
    torch.manual_seed(4)
    tokens, width, hidden, experts, k = shape
    gate, up = (torch.randn(experts, hidden, width, device=DEVICE).bfloat16() / width**0.5 for _ in range(2))
    down = torch.randn(experts, width, hidden, device=DEVICE).bfloat16() / hidden**0.5
    x = torch.randn(tokens, width, device=DEVICE).bfloat16()
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(DEVICE)
    order = torch.argsort(ids.reshape(-1), stable=True)
    token, share = order // k, torch.rand(tokens * k, device=DEVICE)
    first = [0, *torch.bincount(ids.reshape(-1), minlength=experts).cumsum(0).tolist()]
    expected, jobs = torch.zeros(tokens, width, device=DEVICE), []
    for e in range(experts):
        here = slice(first[e], first[e + 1])
        made = feed_forward(x[token[here]].float(), gate[e], up[e], down[e], rounded=False, work=1 << 20)
        expected.index_add_(0, token[here], made * share[here, None])
        addresses = gate[e].data_ptr(), up[e].data_ptr(), down[e].data_ptr()
        jobs.append(Job(addresses, hidden, first[e], first[e + 1]))
    for work in (1 << 30, 2 * hidden * 20):
        y = torch.zeros(tokens, width, device=DEVICE)
        grouped_kernels.Grouped(DEVICE).experts_of_many(x, token, share, jobs, hidden, y, work)
        assert (y - expected).norm() <= 3e-3 * expected.norm()
    pinned = torch.randn(tokens, width, pin_memory=True)
    before = y.clone()
    grouped_kernels.Grouped(DEVICE).add_from_host(y, pinned)
    assert torch.equal(y, before + pinned.to(DEVICE))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(32, 8, 128), (6, 2, 12)])
def test_attention_of_one_token(kind, heads):
    torch.manual_seed(3)
    count, groups, dim = heads
    capacity = 3000
    for position, window in ((0, None), (31, None), (777, None), (2999, None), (2999, 64), (10, 64)):
        q, k, v = (torch.randn(1, n, dim, device=DEVICE) for n in (count, groups, groups))
        keys, values = (torch.randn(groups, capacity, dim, device=DEVICE).to(kind) for _ in range(2))
        cos_sin = torch.polar(torch.ones(capacity, dim // 2), torch.rand(capacity, dim // 2) * 6).to(DEVICE)
        before = keys.clone()
        at = torch.tensor([position], device=DEVICE)
        turned = attention_kernels.rotate_and_store(q, k, v, torch.view_as_real(cos_sin).contiguous(), at, keys, values)
        assert torch.allclose(turned, rotate(q, cos_sin[position, None][None]), atol=1e-5)
        stored = rotate(k, cos_sin[position, None][None])[0].to(kind).float()
        assert torch.allclose(keys[:, position].float(), stored, atol=2e-3)
        assert torch.allclose(values[:, position], v[0].to(kind))
        keep = torch.arange(capacity, device=DEVICE) != position
        assert (keys[:, keep] == before[:, keep]).all()
        if position == 777:  # several from there on, out of one product
            rows = torch.randn(9, (count + 2 * groups) * dim, device=DEVICE)
            many = [part.view(9, -1, dim) for part in rows.split([count * dim, groups * dim, groups * dim], 1)]
            places = cos_sin[position : position + 9, None]
            args = torch.view_as_real(cos_sin).contiguous(), at, keys, values, kind
            rotated = attention_kernels.rotate_and_store(*many, *args)
            assert torch.allclose(rotated.float(), rotate(many[0], places), atol=4e-3)
            expected = rotate(many[1], places).transpose(0, 1)
            assert torch.allclose(keys[:, position : position + 9].float(), expected, atol=4e-3)
            assert torch.allclose(values[:, position : position + 9], many[2].transpose(0, 1).to(kind))
            attention_kernels.rotate_and_store(q, k, v, *args[:-1])
        made = attention_kernels.attend_one(turned, keys, values, at, window)
        seen = (tensor[:, : position + 1].transpose(0, 1).float() for tensor in (keys, values))
        expected = attend(turned, *seen, window)
        assert (made - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def tokens():
    return fiddler.load(device="cpu").tokenizer.encode(PROMPT, add_bos=True)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("residents", [0, 5, None])
@pytest.mark.parametrize("missing", ["auto", "cpu", "stream"])
def test_logits_are_those_of_the_cpu(precision, residents, missing, tokens):
    expected = load(device="cpu", precision=precision).logits(tokens)
    engine = load(device="cuda", precision=precision, gpu_experts=residents, missing=missing)
    made = engine.logits(tokens)
    bound = 1e-4 if precision == "exact" else 3e-2
    assert (made - expected).norm() <= bound * expected.norm()
    # token by token, through the captured graphs
    sequence = engine.runner.sequence()
    one = torch.cat([engine.runner.logits(engine.runner.step([(sequence, [token])])) for token in tokens])
    assert (one - expected).norm() <= bound * expected.norm()


def test_greedy_text_is_the_same_everywhere(tokens):
    greedy = fiddler.Sampling(temperature=0.0)
    texts = {
        name: load(precision="exact", **options).generate(PROMPT, greedy, 60).text
        for name, options in {
            "cpu": {"device": "cpu"},
            "hybrid": {"device": "cuda", "gpu_experts": 7},
            "streamed": {"device": "cuda", "gpu_experts": 7, "missing": "stream"},
            "gpu": {"device": "cuda"},
        }.items()
    }
    assert len(set(texts.values())) == 1, texts


def test_greedy_text_in_16_bits_parts_only_where_two_tokens_are_close(tokens):
    """By no more than rounding moves them, a router's decision included. Says where, and how close (`pytest -rP`)."""
    greedy, count = fiddler.Sampling(temperature=0.0), 200
    exact = load(device="cpu", precision="exact")
    expected = exact.generate(tokens, greedy, count, ignore_eos=True).tokens
    for options in ({"device": "cpu"}, {"device": "cuda", "gpu_experts": 7}, {"device": "cuda"}):
        engine = load(precision="fast", **options)
        made = engine.generate(tokens, greedy, count, ignore_eos=True).tokens
        same = common(expected, made)
        if same == count:
            sys.stdout.write(f"{options}: {count} tokens the same\n")
            continue
        sequence = engine.runner.sequence()
        rounded = engine.runner.prefill(sequence, tokens)
        for token in expected[:same]:  # as it was generated
            rounded = engine.runner.logits(engine.runner.step([(sequence, [token])]))[0]
        right = exact.logits([*tokens, *expected[:same]])[-1]
        margin, error = float(right[expected[same]] - right[made[same]]), float((rounded - right).abs().max())
        found = f"{same} of {count} tokens the same, then two {margin:.4f} apart; logits differ by {error:.4f}"
        sys.stdout.write(f"{options}: {found}\n")
        assert 0 <= margin <= 2 * error


def test_without_a_compiler_torch_does_it(tokens, tmp_path):
    """In a process that finds no C compiler, and no launcher that was built before."""
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


def test_through_buffers_where_the_mapping_may_not_be_registered(tokens, monkeypatch):
    monkeypatch.setattr("fiddler.device.pinned_mapping.available_memory", lambda: 1 << 20)
    monkeypatch.setattr("fiddler.device.pinned_mapping.cached_bytes", lambda address, nbytes: 0)
    expected = load(device="cpu", precision="exact").logits(tokens)
    for missing in ("auto", "stream"):
        told = []
        engine = load(device="cuda", precision="exact", gpu_experts=5, missing=missing, notify=told.append)
        assert any("reading through buffers" in line for line in told)
        assert (engine.logits(tokens) - expected).norm() <= 1e-4 * expected.norm()
        sequence = engine.runner.sequence()
        one = torch.cat([engine.runner.logits(engine.runner.step([(sequence, [token])])) for token in tokens])
        assert (one - expected).norm() <= 1e-4 * expected.norm()


def test_two_sequences_at_once(tokens):
    """The second one finds the first one's place taken."""
    engine = load(device="cuda", precision="exact", gpu_experts=5)
    expected = engine.logits(tokens)
    a, b = engine.runner.sequence(), engine.runner.sequence()
    engine.runner.step([(a, tokens[:3])])
    engine.runner.step([(b, tokens[:5])])
    for sequence, begin in ((a, 3), (b, 5)):
        made = engine.runner.logits(engine.runner.step([(sequence, tokens[begin : begin + 1])]))[0]
        assert torch.allclose(made, expected[begin], atol=1e-3)


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
def test_random_models(model, tmp_path):
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", **model)
    ids = np.random.default_rng(0).integers(3, 200, 60).tolist()
    expected = load(path, "cpu", precision="exact").logits(ids)
    engine = load(path, "cuda", precision="exact", gpu_experts=3)
    assert (engine.logits(ids) - expected).norm() <= 1e-4 * expected.norm()
    sequence = engine.runner.sequence()
    engine.runner.prefill(sequence, ids[:30])
    one = torch.cat([engine.runner.logits(engine.runner.step([(sequence, [token])])) for token in ids[30:]])
    assert (one - expected[30:]).norm() <= 1e-4 * expected.norm()


def test_perplexity_and_expert_counts_are_those_of_the_cpu(tmp_path):
    """Several windows in a step, all in the memory of one sequence; then one window in a step."""
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", experts=5, used=3)
    ids = np.random.default_rng(1).integers(3, 200, 1200).tolist()
    engines = [load(path, "cpu", precision="exact")]
    engines += [load(path, "cuda", precision="exact", gpu_experts=most) for most in (0, 4, None)]
    for size in (65, 500):
        found = []
        for engine in engines:
            with counting(engine.runner.model) as counted:
                *_, made = measure(engine.runner, cut(ids, size), 1)
            found.append((made.perplexity, counted.counts))
        for perplexity, counts in found[1:]:
            assert perplexity == pytest.approx(found[0][0], rel=1e-4)
            assert counts == found[0][1]

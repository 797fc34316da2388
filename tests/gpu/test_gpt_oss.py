"""gpt-oss's parts in Triton's kernels: sinks, biases, the clamped activation; without a GPU, in its interpreter.

Whole models on a GPU are in `test_reference.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fiddler.gpu.growing_pool import GrowingPool
from fiddler.loading import load
from fiddler.models import MIXTRAL
from fiddler.models.config import Config
from fiddler.offload.expert_biases import ExpertBiases, first_row
from fiddler.offload.feed_forward import Job, tokens_by_expert
from fiddler.runtime.block_pool import POSITIONS
from oracles import naive
from oracles.biased_experts import biased_layer, of_experts
from oracles.gpu_in_place import cos_sin_of, engine_in_place
from oracles.interpreter import run_in_interpreter

pytest.importorskip("triton")

from fiddler.gpu import attention_kernels
from fiddler.gpu.decode_cache import DecodeCache
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.offload.grouped_kernels import Grouped
from oracles.block_kernel_checks import OnDevice, inputs_of

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")
KINDS = {"MXFP4": ("mxfp4",) * 3, "f16": "f16"}
SHAPES = [(3, 128, 96, 64)]  # experts, hidden rows, width; the first row of those that are streamed
if GPU:
    KINDS |= {"bf16": "bf16", "uneven": ("q8_0", "mxfp4", "q4_0")}  # the interpreter's bf16 is wrong
    SHAPES += [(3, 512, 256, 256), (2, 2880, 2880, 1472)]  # the last as in gpt-oss


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_parts_of_gpt_oss_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


def at(device, *arrays):
    return [torch.from_numpy(array).to(device) for array in arrays]


@kernels_run
@pytest.mark.parametrize("dtype,bound", [(torch.float16, 4e-3), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("heads,groups,dim,window", [(4, 2, 16, None), (6, 1, 12, 40), (8, 8, 64, 5)])
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_attention_kernels_with_sinks_match_float64(dtype, bound, heads, groups, dim, window, size):
    """size: of sinks, from among the scores to so far above and below that they are all or nothing."""
    rng, lengths = np.random.default_rng(0), [(1, 1), (150, 1), (70, 20), (33, 33)]  # all positions, and new ones
    config = Config(MIXTRAL, 64, 1024, heads * dim, 3, 16, heads, groups, dim, 4, 2, 1e-5, 1e4)
    pool = GrowingPool(config, dtype, DEVICE, sum(-(-total // POSITIONS) for total, _ in lengths))
    numbers = iter(rng.permutation(pool.capacity))
    sinks = (size * rng.normal(size=heads)).astype(np.float32)
    positions, firsts, flat, parts, queries, expected = [], [], [], [], [], []
    for total, new in lengths:
        table = np.array([next(numbers) for _ in range(-(-total // POSITIONS))])
        keys, values = (torch.from_numpy(rng.normal(size=(total, groups, dim))).to(dtype) for _ in range(2))
        every = np.arange(total)
        pool.store(0, pool.places(table[every // POSITIONS], every % POSITIONS), [keys.to(DEVICE), values.to(DEVICE)])
        q = rng.normal(size=(new, heads, dim)).astype(np.float32)
        for row, position in enumerate(range(total - new, total)):
            # the oracle rotates by angles of 0, and is handed a head's positions together
            k, v = (each.transpose(0, 1).double().numpy() for each in (keys, values))
            frequencies = np.zeros(dim // 2, np.float32)
            expected.append(
                naive.attend_one(q[row], k[:, position], v[:, position], k, v, position, frequencies, window, sinks)[0]
            )
        parts.append((len(positions), new))
        positions += every[total - new :].tolist()
        firsts += [len(flat)] * new
        flat += pool.offsets[table].tolist()
        queries.append(q)
    tables = attention_kernels.Tables(*(torch.tensor(each, device=DEVICE) for each in (positions, flat, firsts)))
    (q, sinks), (first, second) = at(DEVICE, np.concatenate(queries), sinks), pool.memory[0, 0]
    out = torch.full_like(q, torch.nan)
    single = torch.tensor([begin for begin, count in parts if count == 1], device=DEVICE)
    attention_kernels.attend_rows(q, first, second, tables, single, window, out, sinks=sinks)
    tiles, most = attention_kernels.tiles_of([part for part in parts if part[1] > 1], dtype)
    tiles = tiles.to(DEVICE), most
    attention_kernels.attend_tiles(q, first, second, tables, tiles, window, out, dtype, sinks=sinks)
    expected = torch.from_numpy(np.stack(expected))
    for begin, count in parts:
        error = (out[begin : begin + count].cpu() - expected[begin : begin + count]).abs().max()
        assert error < (bound if count > 1 else 2e-5), (begin, count, error)


class Layers:
    """Two layers of experts with biases, and the second one's matrices in a device's memory."""

    def __init__(self, kind, shape):
        self.layers = [biased_layer(KINDS[kind], "f32", shape, seed) for seed in range(2)]
        self.w, self.on_device = self.layers[1], OnDevice(self.layers[1], DEVICE)
        self.biases = ExpertBiases.of(self.layers, DEVICE)
        self.experts, self.hidden, self.width = shape

    def job(self, e, begin=0, index=0):
        first = first_row(1, e, self.experts, self.hidden, begin)
        return [*self.on_device.addresses(e, begin), self.hidden - begin, index, first]


@kernels_run
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_kernels_of_one_token_add_the_biases_of_rows_and_those_of_down_once(kind, shape, add):
    """A resident expert, one that is missing, and its last hidden rows, which are streamed."""
    layers, begin = Layers(kind, shape[:3]), shape[3]
    w = layers.w
    x, expert_ids, routing_weights = inputs_of(w, 1, 2)
    device_x, ids, weights = at(DEVICE, x, expert_ids, routing_weights.reshape(-1))
    resident, missing = expert_ids[0].tolist()
    table = torch.tensor([layers.job(e) if e == resident else [0] * 6 for e in range(shape[0])], device=DEVICE)
    into = torch.ones(1, layers.width, device=DEVICE)
    arguments = {"expert_ids": ids, "into": into, "add": add, "biases": layers.biases.of_layer(1)}
    experts_of_one(device_x, table, weights, layers.hidden, w, **arguments)
    of_resident = of_experts(w, x, expert_ids[:, :1], routing_weights[:, :1])
    of_missing = routing_weights[0, 1] * w.down.bias[missing]
    scale = 1e-5 * (np.abs(of_resident).max() + np.abs(of_missing).max())
    assert np.abs(into.cpu().numpy() - add - of_resident - of_missing).max() <= scale
    jobs = torch.tensor([layers.job(missing, begin, 1), [0] * 6], device=DEVICE)
    streamed = {"expert_ids": None, "into": into, "add": False, "biases": layers.biases.hidden}
    experts_of_one(device_x, jobs, weights, layers.hidden - begin, w, **streamed)
    of_rows = of_experts(w, x, expert_ids[:, 1:], routing_weights[:, 1:], begin=begin, down_bias=False)
    assert np.abs(into.cpu().numpy() - of_rows).max() <= scale


@kernels_run
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_of_several_tokens_add_the_biases_of_their_rows(kind, shape):
    layers, experts = Layers(kind, shape[:3]), shape[0]
    w, dtype = layers.w, torch.bfloat16 if kind == "bf16" else torch.float16
    bound = 1e-2 if kind == "bf16" else 2e-3
    for tokens, begin in ((3, 0), (20, shape[3])):
        x, expert_ids, routing_weights = inputs_of(w, tokens, 2)
        expected = of_experts(w, x, expert_ids, routing_weights, begin=begin, down_bias=False)
        _, first = tokens_by_expert(expert_ids, experts)
        order = np.argsort(expert_ids.reshape(-1), kind="stable")
        token, weights, device_x = at(DEVICE, order // 2, routing_weights.reshape(-1)[order], x)
        jobs = []
        for e in range(experts):
            *addresses, rows, _, biases = layers.job(e, begin)
            jobs.append(Job(tuple(addresses), rows, int(first[e]), int(first[e + 1]), biases))
        jobs = [job for job in jobs if job.end > job.first]
        for workspace_bytes in (1 << 30, 2 * w.shape[1] * 5):  # at once, and five tokens at a time
            y = torch.zeros(tokens, layers.width, device=DEVICE)
            Grouped(DEVICE).experts_of_many(
                *(device_x.to(dtype), token, weights, jobs, layers.hidden - begin, y, workspace_bytes, w),
                layers.biases.hidden,
            )
            error = np.linalg.norm(y.cpu().numpy() - expected) / np.linalg.norm(expected)
            assert 0 < error < bound, (tokens, error)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("transformers")
    import fiddler
    from oracles.families import CASES, make_family_checkpoint

    folder = make_family_checkpoint(CASES["gpt-oss, MXFP4"], tmp_path_factory.mktemp("gpt-oss") / "hf")  # window 16
    fiddler.convert(folder, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


def close(ours, expected):
    return (ours.cpu() - expected).norm() <= 1e-4 * expected.norm()


@kernels_run
def test_steps_through_the_kernels_give_the_logits_of_the_cpu(path):
    """Prompts in pieces, single tokens, and several sequences past the window."""
    reference = load(path, device="cpu", precision="exact")
    if GPU:
        engine = load(path, device="cuda", precision="exact", gpu_experts=5)
    else:
        engine = engine_in_place(path, attention=attention_kernels, residents=[[0, 3], [], [2]])
    runner, ids, more = engine.runner, [7 * i % 500 for i in range(70)], [9, 8, 7]
    expected, other = reference.logits(ids), reference.logits(more)
    first, second = runner.sequence(), runner.sequence()
    rows = [runner.step([(first, part)]).logits for part in (ids[:30], ids[30:45], ids[45:46], ids[46:47])]
    assert close(torch.cat(rows), expected[:47])
    rows = runner.step([(first, ids[47:48]), (second, more[:2])]).logits
    assert close(rows, torch.cat([expected[47:48], other[:2]]))
    rows = runner.step([(second, more[2:]), (first, ids[48:])]).logits
    assert close(rows, torch.cat([other[2:], expected[48:]]))


@kernels_run
@pytest.mark.skipif(GPU, reason="graphs do this")
def test_single_tokens_go_through_the_kernels_of_captured_graphs(path, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_SPLITS", 2)  # the interpreter is slow
    engine, ids = load(path, device="cpu", precision="exact"), list(range(30, 64))
    pool, place = GrowingPool(engine.config, torch.float32, DEVICE, 2), torch.zeros(20, dtype=torch.int64)
    cache = DecodeCache(pool, place, cos_sin_of(engine.config, engine.context), engine.config)
    blocks, expected = [pool.take(), pool.take()], engine.logits(ids)
    table = pool.offsets[[block.number for block in blocks]]
    for position, token in enumerate(ids):
        place[0], place[1:3] = position, torch.from_numpy(table)
        with torch.inference_mode():
            logits = engine.runner.logits(engine.runner.model(torch.tensor([token]), cache))
        assert close(logits[0], expected[position]), position


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_torch_alone_gives_the_logits_of_the_cpu(tmp_path, monkeypatch):
    import fiddler
    from oracles.families import CASES, make_family_checkpoint

    folder = make_family_checkpoint(CASES["gpt-oss, YaRN"], tmp_path / "hf")  # quantised weights need Triton
    fiddler.convert(folder, tmp_path / "model.gguf")
    expected = load(tmp_path / "model.gguf", device="cpu", precision="exact").logits([*range(30, 100)])
    monkeypatch.setattr("fiddler.gpu.loader._triton_kernels", lambda *arguments, required: None)
    engine = load(tmp_path / "model.gguf", device="cuda", precision="exact", gpu_experts=5)
    assert engine.runner._decoder is None
    sequence = engine.runner.sequence()
    rows = [
        engine.runner.step([(sequence, part)]).logits for part in ([*range(30, 95)], *([i] for i in range(95, 100)))
    ]
    assert close(torch.cat(rows), expected)
    assert close(engine.logits([*range(30, 100)]), expected)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_batch_and_greedy_text_are_those_of_the_cpu(path):
    import fiddler

    greedy = fiddler.Sampling(temperature=0.0)
    prompts = [[100 + n, *range(200, 200 + 11 * n)] for n in range(1, 5)]
    reference = load(path, device="cpu", precision="exact")
    expected = [reference.generate(prompt, greedy, 20, ignore_eos=True).tokens for prompt in prompts]
    for options in ({}, {"gpu_experts": 5}, {"gpu_experts": 0, "missing": "stream"}):
        engine = load(path, device="cuda", precision="exact", **options)
        requests = [engine.start(fiddler.Request(prompt, greedy, 20, ignore_eos=True)) for prompt in prompts]
        batch = {index: outcome.tokens for index, outcome in engine.batch(requests)}
        assert [batch[index] for index in range(len(prompts))] == expected
        alone = [engine.generate(prompt, greedy, 20, ignore_eos=True).tokens for prompt in prompts]
        assert alone == expected

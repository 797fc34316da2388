"""Latent attention in blocks on the GPU: kernels, steps and graphs. Without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fiddler.gpu.growing_pool import GrowingPool
from fiddler.gpu.layers import GpuLinear
from fiddler.loading import DEMO_MODEL, load
from fiddler.models.architecture import Role, RouterRule, Scoring
from fiddler.models.config import LatentWidths
from fiddler.models.rotary import rotate
from fiddler.runtime.block_pool import POSITIONS
from oracles.gpu_in_place import cos_sin_of, engine_in_place
from oracles.gpu_time import replayed
from oracles.interpreter import run_in_interpreter
from tools.random_model import SHAPES, write_random_model

try:
    from fiddler.gpu import attention_kernels, decode_kernels, latent_kernels
except ImportError:
    attention_kernels = decode_kernels = latent_kernels = None

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")

TINY = replace(
    SHAPES["deepseek-v2-lite"], context_length=512, embedding_length=64, block_count=3, expert_feed_forward_length=40,
    head_count=4, head_dim=40, expert_count=8, expert_used_count=3, feed_forward_length=88, rope_scaling=None,
    expert_shared_feed_forward_length=48, rope_dimension_count=8, latent=LatentWidths(latent=32, key=24, value=12),
)  # fmt: skip
_OF_QUERIES = frozenset((Role.QUERY_DOWN, Role.QUERY_DOWN_NORM, Role.QUERY_UP))
MODELS = {
    "V2-Lite": TINY,
    "V3, odd": replace(
        TINY, embedding_length=50, head_count=18, head_dim=38, rope_dimension_count=12, leading_dense_block_count=2,
        router=RouterRule(Scoring.SIGMOID, True, 2.5, 4, 2), latent=LatentWidths(26, 22, 10, 20),
        absent=TINY.absent - _OF_QUERIES - {Role.SELECTION_BIAS} | {Role.QUERY},
    ),
}  # fmt: skip
WIDTHS = [(4, 8, 24), (18, 12, 26), (33, 16, 48)]  # heads, rotated elements, latent
LARGE = [(128, 64, 512), (16, 64, 512), (6, 64, 512)] if GPU else []


@pytest.mark.skipif(GPU or INTERPRETED or latent_kernels is None, reason="the kernels run in this process")
def test_the_kernels_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    if latent_kernels is not None and not GPU:
        monkeypatch.setattr(latent_kernels, "_PROGRAMS", 4)  # the interpreter is slow


def naive(q, stored, rotated):
    """Latent attention in float64: q [n, H, d], the last of S positions; stored [S, d]. Returns [n, H, d - rotated]."""
    out = []
    for i, position in enumerate(range(len(stored) - len(q), len(stored))):
        seen = stored[: position + 1].double()
        scores = q[i].double() @ seen.T / seen.shape[1] ** 0.5
        out.append(torch.softmax(scores, -1) @ seen[:, rotated:])
    return torch.stack(out)


@kernels_run
@pytest.mark.parametrize("dtype,bound", [(torch.float16, 4e-3), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("heads,rotated,latent", [*WIDTHS, *LARGE])
def test_latent_kernels_over_scattered_blocks_match_float64(dtype, bound, heads, rotated, latent):
    """Sequences of one and of several new positions in one step, in a pool that has grown. Unused positions are NaN."""
    generator, layer, dim = torch.Generator().manual_seed(0), 1, rotated + latent
    lengths = [(1, 1), (70, 1), (33, 5), (101, 2)]  # all positions, and new ones
    lengths += [(3000, 1), (2999, 1), (2000, 200)] if GPU else []
    widths = LatentWidths(latent, rotated + 16, 16)
    config = replace(TINY, head_count=heads, head_dim=dim, rope_dimension_count=rotated, latent=widths)
    pool = GrowingPool(config, dtype, DEVICE, 5)
    pool._by, pool.room = 4, lambda: 1 << 40
    while pool.capacity < sum(-(-total // POSITIONS) for total, _ in lengths):
        pool.grow()
    for segment in pool.segments:
        segment.fill_(torch.nan)
    numbers = iter(np.random.default_rng(0).permutation(pool.capacity))
    cos_sin = cos_sin_of(config, 3000)
    whole = torch.nn.functional.pad(torch.view_as_complex(cos_sin), (0, latent // 2), value=1.0)
    tokens = sum(new for _, new in lengths)
    q, k = (torch.randn(tokens, n, dim, generator=generator) for n in (heads, 1))
    q[0] *= 1e5  # as float16 it would be infinite
    positions, firsts, flat, parts, expected = [], [], [], [], []
    for total, new in lengths:
        table = np.array([next(numbers) for _ in range(-(-total // POSITIONS))])
        stored, old = torch.randn(total, 1, dim, generator=generator).to(dtype), np.arange(total - new)
        pool.store(layer, pool.places(table[old // POSITIONS], old % POSITIONS), [stored[: total - new].to(DEVICE)])
        rows, at = slice(len(positions), len(positions) + new), torch.arange(total - new, total)
        stored[total - new :] = rotate(k[rows], whole[at]).to(dtype)
        expected.append(naive(rotate(q[rows], whole[at]), stored[:, 0], rotated))
        parts.append((rows.start, new))
        positions += at.tolist()
        firsts += [len(flat)] * new
        flat += pool.offsets[table].tolist()
    assert len(pool.segments) > 2
    tables = attention_kernels.Tables(*(torch.tensor(each, device=DEVICE) for each in (positions, flat, firsts)))
    keys = pool.memory[0, layer, 0]
    at_device = [each.to(DEVICE) for each in (q, k, k, cos_sin)]
    turned = attention_kernels.rotate_and_store(*at_device, tables, keys, None)
    out = torch.full_like(q, torch.nan, device=DEVICE)
    for many in (False, True):
        bounds, size = attention_kernels.latent_tiles([each for each in parts if (each[1] > 1) == many], heads, dtype)
        tiles = attention_kernels.LatentTiles(bounds.to(DEVICE), size)
        attention_kernels.attend_latent(turned, keys, tables, tiles, rotated, out, dtype)
    for (begin, count), rows in zip(parts, expected, strict=True):
        error = (out[begin : begin + count, :, rotated:].cpu() - rows).abs().max()
        assert error < bound, (begin, count, error)


@kernels_run
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 12, 32), (5, 30, 600), *([(128, 512, 128), (128, 128, 512)] if GPU else [])])
def test_kernels_multiply_by_each_heads_matrix(shape, kind):
    """Also by its transpose in place, as in files that have keys and values in one tensor."""
    heads, rows, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, heads, width + 8, generator=generator)[..., 8:].to(DEVICE)
    for w in (torch.randn(heads, rows, width, generator=generator).to(kind),
              torch.randn(heads, width, rows, generator=generator).to(kind).transpose(1, 2)):  # fmt: skip
        w = w.to(DEVICE)
        expected = torch.einsum("thk,hnk->thn", x.double(), w.double())
        y = GpuLinear({"w": w}, decode_kernels, exact=False).per_head(x, "w")
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(params=MODELS.values(), ids=MODELS, scope="module")
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("latent") / "model.gguf"
    write_random_model(path, request.param, DEMO_MODEL)
    return path


def close(ours, expected):
    return torch.linalg.norm(ours.cpu() - expected) < 1e-4 * torch.linalg.norm(expected)


@kernels_run
def test_steps_through_the_kernels_give_the_logits_of_torch(path):
    """Prompts in pieces, single tokens, several sequences and forks, which share blocks until one writes."""
    reference = load(path, device="cpu", precision="exact")
    sparse = len(reference.config.sparse_layers)
    if GPU:
        engine = load(path, device="cuda", precision="exact", gpu_experts=3 * sparse)
    else:
        engine = engine_in_place(path, attention=attention_kernels, residents=[[0, 1, 2]] * sparse)
    runner, ids, more = engine.runner, [7 * i % 500 for i in range(50)], [9, 8, 7]
    expected, other = reference.logits(ids), reference.logits(more)
    sequence = runner.sequence()
    rows = [runner.step([(sequence, part)]).logits for part in (ids[:30], ids[30:34], ids[34:35])]
    assert close(torch.cat(rows), expected[:35])
    second, third = runner.copy(sequence), runner.sequence()
    rows = runner.step([(sequence, ids[35:36]), (third, more[:2]), (second, ids[35:50])]).logits
    assert close(rows, torch.cat([expected[35:36], other[:2], expected[35:50]]))
    rows = runner.step([(sequence, ids[36:37]), (third, more[2:])]).logits
    assert close(rows, torch.cat([expected[36:37], other[2:]]))


@kernels_run
@pytest.mark.skipif(GPU, reason="graphs do this")
def test_single_tokens_read_position_and_blocks_through_the_kernels(path):
    from fiddler.gpu.decode_cache import DecodeCache

    engine = load(path, device="cpu", precision="exact")
    runner, ids = engine.runner, list(range(30, 64))
    expected, pool = engine.logits(ids), GrowingPool(engine.config, torch.float32, DEVICE, 1)
    pool._by, pool.room = 1, lambda: 1 << 40
    place = torch.zeros(20, dtype=torch.int64)
    cache = DecodeCache(pool, place, cos_sin_of(engine.config, engine.context), engine.config)
    blocks = [pool.take() for _ in range(3)][::-1][:2]
    place[1:3] = torch.from_numpy(pool.offsets[[block.number for block in blocks]])
    for position, token in enumerate(ids):
        place[0] = position
        with torch.inference_mode():
            logits = runner.logits(runner.model(torch.tensor([token]), cache))
        assert close(logits[0], expected[position]), position


@on_gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("residents", [0, 7, None])
def test_graphs_give_the_logits_of_the_general_path_and_of_the_cpu(path, precision, residents):
    """And serve every sequence, while the pool grows."""
    reference = load(path, device="cpu", precision=precision)
    engine = load(path, device="cuda", precision=precision, gpu_experts=residents)
    runner, pool = engine.runner, engine.runner.pool
    assert runner._decoder is not None
    ids = [[(7 * i + 11 * n) % 500 for i in range(70)] for n in range(2)]
    expected, held = [reference.logits(each) for each in ids], [pool.take() for _ in range(pool.available - 1)]
    sequences, rows = [runner.sequence() for _ in ids], [[], []]
    for position in range(70):
        for each, sequence in enumerate(sequences):
            rows[each].append(runner.step([(sequence, ids[each][position : position + 1])]).logits)
    assert len(pool.segments) > 1
    decoder, attention = runner._decoder, runner._attention
    runner.decode_with(None, runner._cos_sin, None)
    general, sequence = [], runner.sequence()
    for token in ids[0]:
        general.append(runner.step([(sequence, [token])]).logits)
    runner.decode_with(decoder, runner._cos_sin, attention)
    rows, general = [torch.cat(each) for each in rows], torch.cat(general)
    for ours, theirs in ((rows[0], expected[0]), (rows[1], expected[1]), (general, rows[0])):
        if precision == "exact":
            assert close(ours, theirs)
        else:  # another expert may be chosen at some positions
            errors = torch.linalg.norm(ours - theirs, dim=1) / torch.linalg.norm(theirs, dim=1)
            assert errors.median() < 3e-2
    del held


@on_gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_time_of_latent_attention_is_printed(heads):
    """For `pytest -rP`: of one token, of 64 sequences and of a prompt of DeepSeek-V2-Lite's and V3's widths."""
    config, positions = replace(SHAPES["deepseek-v2-lite"], head_count=heads, block_count=2), 4096
    blocks = positions // POSITIONS
    pool = GrowingPool(config, torch.float16, DEVICE, 64 * blocks)
    table = torch.arange(64 * blocks, device=DEVICE) * int(pool.offsets[1])
    keys, cos_sin = pool.memory[0, 0, 0].zero_(), cos_sin_of(config, positions).to(DEVICE)
    for name, rows in (
        ("a token", [(0, 1)]),
        ("64 tokens", [(t, 1) for t in range(64)]),
        ("a prompt", [(0, positions)]),
    ):
        count = rows[-1][0] + rows[-1][1]
        single = count <= 64
        at = torch.full((count,), positions - 1, device=DEVICE) if single else torch.arange(count, device=DEVICE)
        firsts = torch.arange(count, device=DEVICE) * blocks * single
        tables = attention_kernels.Tables(at, table, firsts)
        bounds, size = attention_kernels.latent_tiles(rows, heads, torch.float16)
        tiles = attention_kernels.LatentTiles(bounds.to(DEVICE), size)
        q, k = (torch.randn(count, n, 576, device=DEVICE) for n in (heads, 1))
        out = torch.empty_like(q)

        def work(q=q, k=k, out=out, tables=tables, tiles=tiles):
            turned = attention_kernels.rotate_and_store(q, k, k, cos_sin, tables, keys, None)
            attention_kernels.attend_latent(turned, keys, tables, tiles, 64, out, torch.float16)

        seconds = replayed(work)
        sys.stdout.write(f"{heads} heads, {name}, {positions} positions: {seconds * 1e6:.1f} us\n")

"""Keys and values in Q8_0 on a GPU: kernels against the `gguf` package, the CPU's encoder and float64.

Without a GPU, Triton's interpreter runs them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from fiddler.gpu.growing_pool import GrowingPool
from fiddler.models import MIXTRAL
from fiddler.models.config import Config, LatentWidths
from fiddler.runtime.block_pool import POSITIONS
from fiddler.runtime.q8_0_rows import codes_and_scales
from oracles.gpu_in_place import cos_sin_of, engine_in_place
from oracles.interpreter import run_in_interpreter
from oracles.q8_0_models import MODELS, latent_model, one_by_one, quantised
from oracles.synthetic import write_random_mixtral
from tools.random_model import SHAPES

try:
    from fiddler.gpu import attention_kernels, latent_kernels
except ImportError:
    attention_kernels = latent_kernels = None

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="graphs do this on a GPU")
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
Q8_0 = gguf.GGMLQuantizationType.Q8_0
HEADS = [(4, 2, 32, None), (6, 2, 96, 40), (2, 1, 64, 5)]  # heads, KV heads, head_dim, window
HEADS += [(32, 8, 128, None), (32, 8, 128, 500), (4, 2, 256, None)] if GPU else []
LATENTS = [(4, 32, 64), (18, 12, 52), (33, 16, 48)]  # heads, rotated elements, latent: aligned to blocks, and not
LATENTS += [(128, 64, 512), (16, 64, 512)] if GPU else []
# stored as, products in, error of tiles
TYPES = [(torch.uint8, torch.float16, 4e-3), (torch.uint8, torch.float32, 2e-5), (torch.float16, torch.float32, 2e-5)]


@pytest.mark.skipif(GPU or INTERPRETED or attention_kernels is None, reason="the kernels run in this process")
def test_the_kernels_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    if latent_kernels is not None and not GPU:
        monkeypatch.setattr(latent_kernels, "_PROGRAMS", 4)  # the interpreter is slow
        monkeypatch.setattr(attention_kernels, "_SPLITS", 2)


def grown(config, dtype, read_as, blocks):
    """A pool of several segments, whose every byte is that of a NaN."""
    pool = GrowingPool(config, dtype, DEVICE, 3, read_as)
    pool._by, pool.room = 4, lambda: 1 << 40
    while pool.capacity < blocks:
        pool.grow()
    for segment in pool.segments:
        segment.view(torch.uint8).fill_(0xFF)
    return pool


def of_gguf(rows):
    """gguf's Q8_0 of float32 rows; it divides by tiny scales."""
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quantize(rows, Q8_0)


def stored(rows, dtype):
    """What is read of rows that were stored so, by gguf's numpy quantiser; float64."""
    if dtype != torch.uint8:
        return rows.to(dtype).double()
    flat = np.ascontiguousarray(rows.numpy()).reshape(-1, rows.shape[-1])
    return torch.from_numpy(gguf.dequantize(of_gguf(flat), Q8_0).reshape(rows.shape)).double()


def rows_of_every_kind(dim):
    """Float32 [n, dim]: zeros, halves between codes, what is tiny, huge or no number, each in blocks of their own."""
    rows = torch.randn(24, dim, generator=torch.Generator().manual_seed(0))
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2] = torch.arange(dim) % 32 - 15.5  # halves, of a scale that is a power of 2
    rows[2, ::32] = -127.0
    rows[3], rows[3, ::32] = -rows[2], 127.0
    rows[4], rows[5], rows[6] = 1e-7, 1e-40, -3e-39  # scales that are 0 as float16, and whose inverse is infinite
    rows[7], rows[8] = rows[9] * 1e5, rows[9] * 1e38
    for row, value in ((10, torch.nan), (11, torch.inf), (12, -torch.inf)):
        rows[row, 5] = value
    rows[13, 3], rows[13, 4] = torch.inf, torch.nan
    rows[14, 30], rows[14, 31] = -torch.inf, torch.inf
    rows[15] = torch.round(rows[15] * 4) / 4
    for row in range(16, 22):  # halves but for the last bit: how the scale's inverse is rounded decides
        largest = rows[row].abs().max()
        rows[row] = (torch.arange(dim) % 32 * 4 - 62.5) * (largest / 127)
        rows[row, ::32] = largest
    return rows


@kernels_run
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_kernels_encode_in_every_bit_as_the_cpu_and_gguf_do(dim):
    values = rows_of_every_kind(dim)
    n, generator = len(values), torch.Generator().manual_seed(1)
    config = Config(MIXTRAL, 64, 1024, 2 * dim, 2, 16, 2, 1, dim, 4, 2, 1e-5, 1e4)
    pool, cos_sin = grown(config, torch.uint8, None, 8), cos_sin_of(config, 512)
    positions = torch.randperm(8 * POSITIONS, generator=generator)[:n]
    blocks = torch.from_numpy(np.random.default_rng(0).permutation(8))
    table, firsts = torch.from_numpy(pool.offsets)[blocks], torch.zeros(n, dtype=torch.int64)
    keys = torch.randn(n, 1, dim, generator=generator)
    tables = attention_kernels.Tables(*(each.to(DEVICE) for each in (positions, table, firsts)))
    first = pool.memory[0, 1]
    q, k, v = (each.to(DEVICE) for each in (torch.randn(n, 2, dim), keys, values[:, None]))
    attention_kernels.rotate_and_store(q, k, v, cos_sin.to(DEVICE), tables, first[0], first[1])
    a, b = keys.unflatten(2, (-1, 2)).unbind(-1)
    c, s = cos_sin[positions].view(n, 1, -1, 2).unbind(-1)
    rotated = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(2)[:, 0]
    for memory, expected in enumerate((rotated, values)):
        expected_codes, expected_scales = codes_and_scales(expected)
        for row, position in enumerate(positions.tolist()):
            place = pool.places(blocks[position // POSITIONS :][:1].numpy(), np.array([position % POSITIONS]))[0]
            codes, scales = pool.layout.planes(place.segment[place.numbers[0], 1, memory, 0].cpu())
            assert torch.equal(codes[position % POSITIONS], expected_codes[row]), row
            bits = scales[position % POSITIONS].view(torch.int16)
            assert torch.equal(bits, expected_scales[row].view(torch.int16)), row
    finite = values[values.isfinite().all(1) & (values.abs() < 1e30).all(1)]
    codes, scales = codes_and_scales(finite)
    expected = of_gguf(finite.numpy()).reshape(-1, 34)
    np.testing.assert_array_equal(expected[:, :2].copy().view(np.float16), scales.reshape(-1, 1).numpy())
    np.testing.assert_array_equal(expected[:, 2:].view(np.int8), codes.reshape(-1, 32).numpy())


def naive(q, keys, values, window):
    """Causal attention in float64: q [n, H, d], the last of S positions; keys [S, G, d] and values [S, G, e]."""
    (n, heads, dim), (total, groups) = q.shape, keys.shape[:2]
    out = torch.zeros(n, heads, values.shape[2], dtype=torch.float64)
    for i in range(n):
        position = total - n + i
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        each = q[i].double().view(groups, heads // groups, dim)
        scores = torch.einsum("grd,sgd->grs", each, keys[seen]) * dim**-0.5
        out[i] = torch.einsum("grs,sge->gre", torch.softmax(scores, -1), values[seen]).flatten(0, 1)
    return out


def filled(config, dtype, read_as, lengths, window):
    """A pool that holds sequences; what the kernels take to attend to them: `Tables`, and each one's rows.

    lengths: of each sequence all positions, and new ones. Returns also the stored memories of each, float64, and its
    rows: the first one and how many.
    """
    generator, layer = torch.Generator().manual_seed(0), 1
    pool = grown(config, dtype, read_as, sum(-(-total // POSITIONS) for total, _ in lengths))
    assert len(pool.segments) > 2
    numbers = iter(np.random.default_rng(0).permutation(pool.capacity))
    positions, firsts, flat, parts, contents = [], [], [], [], []
    for total, new in lengths:
        table = np.array([next(numbers) for _ in range(-(-total // POSITIONS))])
        memories = [
            torch.randn(total, config.head_count_kv, config.head_dim, generator=generator)
            for _ in range(pool.memory.shape[2])
        ]
        at = np.arange(total)
        pool.store(layer, pool.places(table[at // POSITIONS], at % POSITIONS), [each.to(DEVICE) for each in memories])
        contents.append([stored(each, dtype) for each in memories])
        parts.append((len(positions), new))
        positions += range(total - new, total)
        firsts += [len(flat)] * new
        table = pool.offsets[table]
        if window is not None:
            table[: max(0, total - new + 1 - window) // POSITIONS] = 0  # given back
        flat += table.tolist()
    tables = attention_kernels.Tables(*(torch.tensor(each, device=DEVICE) for each in (positions, flat, firsts)))
    return pool, pool.memory[0, layer], tables, contents, parts


@kernels_run
@pytest.mark.parametrize("dtype,products,bound", TYPES, ids=str)
@pytest.mark.parametrize("heads,groups,dim,window", HEADS)
def test_attention_kernels_match_float64_over_what_the_blocks_decode_to(
    dtype, products, bound, heads, groups, dim, window
):
    """Sequences of one and of several new positions in one step. Unused positions are no numbers."""
    lengths = [(1, 1), (70, 1), (33, 33), (200, 1), (130, 20), (101, 5)]
    lengths += [(3000, 1), (2999, 1), (2000, 200)] if GPU else []
    config = Config(MIXTRAL, 64, 1024, heads * dim, 3, 16, heads, groups, dim, 4, 2, 1e-5, 1e4)
    pool, (keys, values), tables, contents, parts = filled(config, dtype, products, lengths, window)
    assert pool.layout.read_as == products
    q = torch.randn(len(tables.positions), heads, dim, generator=torch.Generator().manual_seed(2))
    out, at_device = torch.full_like(q, torch.nan, device=DEVICE), q.to(DEVICE)
    single = torch.tensor([begin for begin, count in parts if count == 1], device=DEVICE)
    attention_kernels.attend_rows(at_device, keys, values, tables, single, window, out)
    tiles, size = attention_kernels.tiles_of([part for part in parts if part[1] > 1], products)
    attention_kernels.attend_tiles(at_device, keys, values, tables, (tiles.to(DEVICE), size), window, out, products)
    for (begin, count), (k, v) in zip(parts, contents, strict=True):
        error = (out[begin : begin + count].cpu() - naive(q[begin : begin + count], k, v, window)).abs().max()
        assert error < (bound if count > 1 else 2e-5), (begin, count, error)


@kernels_run
@pytest.mark.parametrize("dtype,products,bound", TYPES, ids=str)
@pytest.mark.parametrize("heads,rotated,latent", LATENTS)
def test_latent_kernels_match_float64_over_what_the_blocks_decode_to(dtype, products, bound, heads, rotated, latent):
    lengths = [(1, 1), (70, 1), (33, 5), (101, 2)] + ([(3000, 1), (2999, 1), (2000, 200)] if GPU else [])
    config = replace(
        SHAPES["deepseek-v2-lite"], block_count=2, head_count=heads, head_dim=rotated + latent,
        rope_dimension_count=rotated, latent=LatentWidths(latent, rotated + 16, 16),
    )  # fmt: skip
    _, (keys,), tables, contents, parts = filled(config, dtype, products, lengths, None)
    q = torch.randn(len(tables.positions), heads, rotated + latent, generator=torch.Generator().manual_seed(2))
    q[0] *= 1e5  # as float16 it would be infinite
    out, at_device = torch.full_like(q, torch.nan, device=DEVICE), q.to(DEVICE)
    for many in (False, True):
        rows = [each for each in parts if (each[1] > 1) == many]
        bounds, size = attention_kernels.latent_tiles(rows, heads, products)
        tiles = attention_kernels.LatentTiles(bounds.to(DEVICE), size)
        attention_kernels.attend_latent(at_device, keys, tables, tiles, rotated, out, products)
    for (begin, count), (vectors,) in zip(parts, contents, strict=True):
        expected = naive(q[begin : begin + count], vectors, vectors[..., rotated:], None)
        error = (out[begin : begin + count, :, rotated:].cpu() - expected).abs().max()
        assert error < bound, (begin, count, error)


@pytest.fixture(params=[*MODELS, "latent"], scope="module")
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("q8")
    if request.param == "latent":
        return latent_model(folder, 24)
    return write_random_mixtral(folder / "tiny.gguf", **MODELS[request.param])


def close(ours, expected):
    """But where a number lies between two codes, and another rounding chose the other one."""
    errors = (ours.cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    return errors.median() < 1e-5 and errors.max() < 3e-3


@in_interpreter
def test_steps_through_the_kernels_give_the_logits_of_the_cpu(path):
    """Prompts in pieces, single tokens, several sequences and forks, which share blocks until one writes."""
    reference = quantised(path)
    residents = [[0, 1, 2]] * len(reference.config.sparse_layers)
    runner = engine_in_place(path, attention=attention_kernels, residents=residents, dtype=torch.uint8).runner
    ids, more = [7 * i % 500 for i in range(72)], [9, 8, 7]
    expected, other = one_by_one(reference, ids, 42), one_by_one(reference, more, 2)  # from 30 tokens and from 1 on
    sequence = runner.sequence()
    rows = [runner.step([(sequence, part)]).logits[-1] for part in (ids[:30], ids[30:42], ids[42:43])]
    assert close(torch.stack(rows), expected[[0, 12, 13]])
    second, third = runner.copy(sequence), runner.sequence()
    rows = runner.step([(sequence, ids[43:44]), (third, more[:2]), (second, ids[43:72])]).logits
    assert close(rows, torch.cat([expected[14:15], other[:2], expected[14:]]))
    rows = runner.step([(sequence, ids[44:45]), (third, more[2:])]).logits
    assert close(rows, torch.stack([expected[15], other[2]]))


@in_interpreter
def test_single_tokens_read_position_and_blocks_through_the_kernels(path):
    from fiddler.gpu.decode_cache import DecodeCache

    engine, ids = quantised(path), list(range(30, 64))
    expected, pool = one_by_one(engine, ids, len(ids) - 1), grown(engine.config, torch.uint8, None, 9)
    place = torch.zeros(20, dtype=torch.int64)
    cache = DecodeCache(pool, place, cos_sin_of(engine.config, engine.context), engine.config)
    place[1:3] = torch.from_numpy(pool.offsets[[8, 1]])
    rows = []
    for position, token in enumerate(ids):
        place[0] = position
        with torch.inference_mode():
            rows.append(engine.runner.logits(engine.runner.model(torch.tensor([token]), cache))[0])
    assert close(torch.stack(rows), expected)

"""KV caches in blocks on the GPU. Without one, torch attends on the CPU, and Triton's interpreter runs the kernels."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.gpu import elastic_budget
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.loading import load
from fiddler.models import MIXTRAL
from fiddler.models.config import Config
from fiddler.runtime.block_pool import POSITIONS
from oracles.gpu_in_place import cos_sin_of, engine_in_place, growing
from oracles.gpu_time import replayed
from oracles.interpreter import run_in_interpreter
from oracles.scheduler_machine import Alone, mix
from oracles.synthetic import write_random_mixtral

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")
GREEDY = Sampling(temperature=0.0)
LARGE = [(32, 8, 128, None), (32, 8, 128, 500), (4, 2, 256, None)] if GPU else []

try:
    from fiddler.gpu import attention_kernels
except ImportError:
    attention_kernels = None


@pytest.mark.skipif(GPU or INTERPRETED or attention_kernels is None, reason="the kernels run in this process")
def test_the_kernels_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


def naive(q, keys, values, window):
    """Causal attention in float64: q [n, H, d], the last of S positions; keys and values [S, G, d]."""
    (n, heads, dim), (total, groups) = q.shape, keys.shape[:2]
    out = torch.zeros(n, heads, dim, dtype=torch.float64)
    for i in range(n):
        position = total - n + i
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        for head in range(heads):
            k, v = (each[seen, head * groups // heads] for each in (keys, values))
            out[i, head] = torch.softmax(k @ q[i, head] * dim**-0.5, 0) @ v
    return out


def rotated(x, cos_sin, positions):
    a, b = x.double().unflatten(2, (-1, 2)).unbind(-1)
    c, s = cos_sin[positions].double()[:, None].unbind(-1)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(2)


@kernels_run
@pytest.mark.parametrize("dtype,bound", [(torch.float16, 4e-3), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("heads,groups,dim,window", [(4, 2, 16, None), (6, 2, 12, 40), (2, 1, 80, 5), *LARGE])
def test_attention_kernels_over_scattered_blocks_match_float64(dtype, bound, heads, groups, dim, window):
    """Sequences of one and of several new positions in one step, in a pool that has grown. Unused positions are NaN."""
    generator, layer = torch.Generator().manual_seed(0), 1
    lengths = [(1, 1), (70, 1), (33, 33), (200, 1), (130, 20), (101, 5)]  # all positions, and new ones
    lengths += [(3000, 1), (2999, 1), (2000, 200)] if GPU else []
    config = Config(MIXTRAL, 64, 1024, heads * dim, 3, 16, heads, groups, dim, 4, 2, 1e-5, 1e4)
    pool = GrowingPool(config, dtype, DEVICE, 12)
    pool._by, pool.room = 5, lambda: 1 << 40
    while pool.capacity < sum(-(-total // POSITIONS) for total, _ in lengths):
        pool.grow()
    for segment in pool.segments:
        segment.fill_(torch.nan)
    numbers = iter(np.random.default_rng(0).permutation(pool.capacity))
    cos_sin = torch.polar(torch.ones(3000, dim // 2), torch.rand(3000, dim // 2, generator=generator) * 6)
    cos_sin = torch.view_as_real(cos_sin).contiguous()
    q, k, v = (
        torch.randn(sum(new for _, new in lengths), n, dim, generator=generator) for n in (heads, groups, groups)
    )
    positions, firsts, flat, parts, expected = [], [], [], [], []
    for total, new in lengths:
        table = np.array([next(numbers) for _ in range(-(-total // POSITIONS))])
        keys, values = (torch.randn(total, groups, dim, generator=generator).to(dtype) for _ in range(2))
        old = np.arange(total - new)
        pool.store(layer, pool.places(table[old // POSITIONS], old % POSITIONS),
                   [each[: total - new].to(DEVICE) for each in (keys, values)])  # fmt: skip
        rows, at = slice(len(positions), len(positions) + new), torch.arange(total - new, total)
        keys[total - new :], values[total - new :] = rotated(k[rows], cos_sin, at).to(dtype), v[rows].to(dtype)
        expected.append(naive(rotated(q[rows], cos_sin, at), keys.double(), values.double(), window))
        parts.append((rows.start, new))
        positions += at.tolist()
        firsts += [len(flat)] * new
        table = pool.offsets[table]
        if window is not None:
            table[: max(0, total - new + 1 - window) // POSITIONS] = 0  # given back
        flat += table.tolist()
    assert len(pool.segments) > 2
    tables = attention_kernels.Tables(*(torch.tensor(each, device=DEVICE) for each in (positions, flat, firsts)))
    first = pool.memory[0, layer]
    at_device = [each.to(DEVICE) for each in (q, k, v, cos_sin)]
    turned = attention_kernels.rotate_and_store(*at_device, tables, first[0], first[1])
    out = torch.full_like(q, torch.nan, device=DEVICE)
    single = torch.tensor([begin for begin, count in parts if count == 1], device=DEVICE)
    attention_kernels.attend_rows(turned, first[0], first[1], tables, single, window, out)
    tiles, size = attention_kernels.tiles_of([part for part in parts if part[1] > 1], dtype)
    attention_kernels.attend_tiles(turned, first[0], first[1], tables, (tiles.to(DEVICE), size), window, out, dtype)
    for (begin, count), rows in zip(parts, expected, strict=True):
        error = (out[begin : begin + count].cpu() - rows).abs().max()
        assert error < (bound if count > 1 else 2e-5), (begin, count, error)


@pytest.fixture(params=[None, 20], ids=["no window", "a window"])
def path(request, tmp_path):
    return write_random_mixtral(tmp_path / "tiny.gguf", window=request.param)


def paged_engine(path, residents=3):
    if GPU:
        return load(path, device="cuda", precision="exact", gpu_experts=residents)
    placed = None if residents == 3 else [[0, 1, 2], [0, 1, 2]]
    return engine_in_place(path, attention=attention_kernels, residents=placed)


def close(ours, expected):
    return torch.allclose(ours.cpu(), expected, atol=1e-3)


@kernels_run
def test_steps_through_the_kernels_give_the_logits_of_the_cpu(path):
    """Prompts in pieces, single tokens, several sequences and forks, which share blocks until one writes."""
    engine, reference = paged_engine(path), load(path, device="cpu", precision="exact")
    runner, ids, more = engine.runner, [7 * i % 500 for i in range(100)], [9, 8, 7]
    expected, other = reference.logits(ids), reference.logits(more)
    sequence = runner.sequence()
    rows = [runner.step([(sequence, part)]).logits for part in (ids[:45], ids[45:64], ids[64:65], ids[65:66])]
    assert close(torch.cat(rows), expected[:66])
    second = runner.copy(sequence)
    used = runner.pool.used
    third = runner.sequence()
    rows = runner.step([(sequence, ids[66:67]), (third, more[:2]), (second, ids[66:90])]).logits
    assert close(rows, torch.cat([expected[66:67], other[:2], expected[66:90]]))
    assert runner.pool.used <= used + 1 + 1 + 1  # the third, a copy of the block that both write to, and one more
    rows = runner.step([(second, ids[90:91]), (sequence, ids[67:68]), (third, more[2:])]).logits
    assert close(rows, torch.cat([expected[90:91], expected[67:68], other[2:]]))
    runner.forget()
    del sequence, second, third
    gc.collect()
    assert runner.pool.used == 0


@kernels_run
@pytest.mark.skipif(GPU, reason="graphs do this")
def test_single_tokens_read_position_and_blocks_through_the_kernels(path, monkeypatch):
    from fiddler.gpu.decode_cache import DecodeCache

    monkeypatch.setattr(attention_kernels, "_SPLITS", 2)  # the interpreter is slow
    engine = load(path, device="cpu", precision="exact")
    runner, ids, context = engine.runner, list(range(30, 64)), engine.context
    pool = GrowingPool(engine.config, torch.float32, DEVICE, 2)
    place = torch.zeros(20, dtype=torch.int64)
    cache = DecodeCache(pool, place, cos_sin_of(engine.config, context), engine.config)
    pool._by, pool.room = 1, lambda: 1 << 40
    blocks = [[pool.take(), pool.take()], [pool.take(), pool.take()]]  # of two sequences, which take turns
    assert len(pool.segments) == 3
    for position, pair in enumerate(zip(ids, reversed(ids), strict=True)):
        for index, token in enumerate(pair):
            table = pool.offsets[[block.number for block in blocks[index]]]
            place[0], place[1:3] = position, torch.from_numpy(table)
            with torch.inference_mode():
                hidden = runner.model(torch.tensor([token]), cache)
            if position in (0, 31, 33):
                expected = engine.logits((ids if index == 0 else ids[::-1])[: position + 1])[-1]
                assert close(runner.logits(hidden)[0], expected)


@on_gpu
def test_graphs_serve_every_sequence_and_every_growth_of_the_pool(path):
    engine, reference = paged_engine(path), load(path, device="cpu", precision="exact")
    runner, pool = engine.runner, engine.runner.pool
    ids = [[(7 * i + 11 * n) % 500 for i in range(80)] for n in range(3)]
    expected = [reference.logits(each) for each in ids]
    held = [pool.take() for _ in range(pool.available - 2)]
    sequences = [runner.sequence() for _ in ids]
    for position in range(80):
        for sequence, tokens, rows in zip(sequences, ids, expected, strict=True):
            logits = runner.step([(sequence, tokens[position : position + 1])]).logits[0]
            assert close(logits, rows[position]), position
    assert len(pool.segments) > 1
    forked = runner.copy(sequences[0])
    both = [runner.step([(each, [token])]).logits[0] for each, token in ((forked, 5), (sequences[0], 6))]
    for logits, token in zip(both, (5, 6), strict=True):
        assert close(logits, reference.logits([*ids[0], token])[-1])
    del held, forked, sequences


def test_requests_in_any_mixture_give_what_each_gives_alone_while_the_pool_grows(tmp_path):
    """On a GPU the pool has grown before, since graphs captured its first memory."""
    path = write_random_mixtral(tmp_path / "tiny.gguf")
    if not GPU:
        mix(engine_in_place(path), Alone(path), 12, growing)
        return
    for residents in (3, None):
        engine = load(path, device="cuda", precision="exact", gpu_experts=residents, context=512)
        pool = engine.runner.pool
        while pool.capacity < 60 and pool.grow():
            continue

        def limited(runner, capacity, pool=pool):
            runner.forget()
            assert pool.used == 0
            pool.capacity, pool.room = capacity, lambda: 0

        mix(engine, Alone(path), 25, limited)


@on_gpu
def test_residents_give_their_memory_to_the_pool_and_come_back_beside_captured_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(elastic_budget, "_ASKED", 1)
    monkeypatch.setattr(elastic_budget, "_PATIENCE", 2)
    path = write_random_mixtral(tmp_path / "tiny.gguf")
    engine, reference = paged_engine(path, residents=6), load(path, device="cpu", precision="exact")
    runner, pool, residents = engine.runner, engine.runner.pool, engine.runner.orchestrator.residents
    ids = [7 * i % 500 for i in range(250)]
    before, expected, nbytes = residents.by_layer(), reference.logits(ids), runner.kv_bytes(1)

    def taken():
        resident = sum(
            residents.nbytes(layer, e) for layer, experts in enumerate(residents.by_layer()) for e in experts
        )
        return pool.capacity * nbytes + resident

    pool._by, total = 4, taken() + nbytes
    runner.share_budget(lambda: total - taken())
    held, sequence = [pool.take() for _ in range(pool.available)], runner.sequence()
    for position in range(120):
        logits = runner.step([(sequence, ids[position : position + 1])]).logits[0]
        assert close(logits, expected[position]), position
    assert close(runner.step([(sequence, ids[120:200])]).logits, expected[120:200])
    assert len(residents) < 6
    del held
    for position in range(200, 250):
        logits = runner.step([(sequence, ids[position : position + 1])]).logits[0]
        assert close(logits, expected[position]), position
    assert residents.by_layer() == before
    assert pool.moves


@on_gpu
def test_many_sequences_run_at_once_share_their_prefix_and_stay_within_the_budget():
    gc.collect()
    torch.cuda.empty_cache()  # the budget counts what other engines of this process left
    engine = load(device="cuda", gpu_memory="4GiB")
    runner, prefix = engine.runner, [100 + i % 900 for i in range(704)]
    requests = [fiddler.Request([*prefix, 50 + n], GREEDY, 8, ignore_eos=True) for n in range(10)]
    assert len(dict(engine.batch([engine.start(request) for request in requests]))) == 10
    assert runner.pool.used <= 22 + 10 * 2
    runner.forget()
    assert runner.pool.used == 0
    prompts = [[100 + n, *range(200, 263)] for n in range(600)]
    most = []
    requests = [engine.start(fiddler.Request(ids, GREEDY, 32, ignore_eos=True)) for ids in prompts]
    for _, outcome in engine.batch(requests, parallel=256, on_step=lambda tokens, sequences: most.append(sequences)):
        assert len(outcome.tokens) == 32
    assert max(most) == 256
    assert runner.budget.used() <= runner.budget.total
    runner.forget()
    assert runner.pool.used == 0


@on_gpu
@pytest.mark.parametrize("positions", [150, 4000])
def test_time_of_attention_is_printed(positions):
    """For `pytest -rP`: of one token of Mixtral, of 256 sequences, and of a prompt beside torch's."""
    config = Config(MIXTRAL, 64, 8192, 4096, 1, 16, 32, 8, 128, 4, 2, 1e-5, 1e4)
    pool = GrowingPool(config, torch.float16, DEVICE, 256 * -(-positions // POSITIONS))
    for batch in (1, 256):
        table = torch.arange(len(pool.offsets), device=DEVICE) * int(pool.offsets[1])
        at = torch.full((batch,), positions - 1, device=DEVICE)
        firsts = torch.arange(batch, device=DEVICE) * -(-positions // POSITIONS)
        tables = attention_kernels.Tables(at, table, firsts)
        q, out = torch.randn(batch, 32, 128, device=DEVICE), torch.empty(batch, 32, 128, device=DEVICE)
        k, rows = torch.randn(batch, 8, 128, device=DEVICE), torch.arange(batch, device=DEVICE)
        cos_sin = torch.zeros(8192, 64, 2, device=DEVICE)
        keys, values = pool.memory[0, 0]

        def work(q=q, k=k, out=out, tables=tables, rows=rows, keys=keys, values=values, cos_sin=cos_sin):
            turned = attention_kernels.rotate_and_store(q, k, k, cos_sin, tables, keys, values)
            attention_kernels.attend_rows(turned, keys, values, tables, rows, None, out)

        sys.stdout.write(f"{batch} sequences of {positions} positions: {replayed(work) * 1e6:.1f} us\n")
    q = torch.randn(positions, 32, 128, device=DEVICE)
    firsts = torch.zeros(positions, dtype=torch.int64, device=DEVICE)
    tables = attention_kernels.Tables(torch.arange(positions, device=DEVICE), table, firsts)
    tiles, size = attention_kernels.tiles_of([(0, positions)], torch.float16)
    out, tiles = torch.empty_like(q), tiles.to(DEVICE)
    ours = replayed(
        lambda: attention_kernels.attend_tiles(q, keys, values, tables, (tiles, size), None, out, torch.float16)
    )
    half = [torch.randn(1, n, positions, 128, device=DEVICE, dtype=torch.float16) for n in (32, 32, 32)]
    torchs = replayed(lambda: torch.nn.functional.scaled_dot_product_attention(*half, is_causal=True))
    sys.stdout.write(f"a prompt of {positions}: {ours * 1e6:.0f} us, torch {torchs * 1e6:.0f} us\n")

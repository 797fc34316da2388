"""Keys and values in Q8_0 on a GPU, in whole engines. Without a GPU, the CPU takes its place where it can."""

from __future__ import annotations

import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.cost_curve import Curve
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.events import Finished
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.models import MIXTRAL
from fiddler.models.config import Config
from fiddler.runtime.block_pool import POSITIONS
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.kv_cache_file import PromptCache
from fiddler.runtime.q8_0_rows import codes_and_scales, encoded
from fiddler.runtime.resume_costs import ResumeCosts
from oracles.gpu_in_place import cos_sin_of, engine_in_place, growing
from oracles.gpu_time import replayed
from oracles.q8_0_models import IDS, MODELS, latent_model, one_by_one, quantised
from oracles.synthetic import write_random_mixtral
from tools.random_model import SHAPES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
GREEDY = Sampling(temperature=0.0)
Q8_0 = gguf.GGMLQuantizationType.Q8_0
TYPES = torch.float16, torch.uint8  # of which the second stands for Q8_0
CONFIG = Config(MIXTRAL, 64, 1024, 192, 2, 16, 4, 2, 96, 4, 2, 1e-5, 1e4)


@pytest.fixture(params=[*MODELS, "latent"], scope="module")
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("q8")
    if request.param == "latent":
        return latent_model(folder, 24)
    return write_random_mixtral(folder / "tiny.gguf", **MODELS[request.param])


def gpu_engine(path, **options):
    """With Q8_0 in blocks as on a GPU; some experts are missing."""
    if GPU:
        return quantised(path, device="cuda", **{"gpu_experts": 3} | options)
    return engine_in_place(path, dtype=torch.uint8)


def same_text(reference, prompt, tokens, expected):
    """Assert that texts are equal; on a GPU they may part where other codes decide between the two best tokens."""
    assert GPU or tokens == expected
    for index, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
        if ours != theirs:
            best = reference.logits([*prompt, *expected[:index]])[-1].topk(2).values
            assert best[0] - best[1] <= 1e-2 * best[0].abs(), (index, tokens, expected)
            return


def test_rows_are_where_they_were_after_copies_moves_and_a_stay_in_host_memory():
    pool = GrowingPool(CONFIG, torch.uint8, DEVICE, 3)
    pool._by, pool.room = 2, lambda: 1 << 40
    blocks = [pool.take() for _ in range(8)]
    numbers = np.array([block.number for block in blocks]).repeat(POSITIONS)
    rows = np.tile(np.arange(POSITIONS), len(blocks))
    order = np.random.default_rng(0).permutation(len(rows))
    memories = [torch.randn(len(rows), 2, 96, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    for layer in range(2):
        new = [memory.to(DEVICE) for memory in memories[2 * layer : 2 * layer + 2]]
        pool.store(layer, pool.places(numbers[order], rows[order]), [each[torch.from_numpy(order)] for each in new])

    def check(held, expected, positions=POSITIONS):
        for n, memory in enumerate(memories):
            read = pool.blocks(n // 2, n % 2, np.array([block.number for block in held])).cpu()
            flat = memory.transpose(0, 1).unflatten(1, (-1, POSITIONS))[:, expected].contiguous()
            decoded = gguf.dequantize(gguf.quantize(flat.numpy().reshape(-1, 96), Q8_0), Q8_0).reshape(flat.shape)
            np.testing.assert_array_equal(read[:, :, :positions].numpy(), decoded[:, :, :positions])

    check(blocks, list(range(8)))
    pool.copy(blocks[7], blocks[0], 5)
    check(blocks[:1], [7], 5)
    store = HostStore(pool, 1 << 20, ResumeCosts(512, None))
    stored = store.save(blocks[6])
    store.load([(stored, blocks[1])])
    check(blocks[1:2], [6])
    del blocks[2:6]
    assert pool.shrink(5)
    assert pool.moves
    check(blocks[-2:], [6, 7])


def test_a_prompt_cache_file_goes_from_a_gpu_to_a_cpu_and_back(path, tmp_path):
    """In every bit: the file that each writes of what it read from the other's is that file."""
    engines = [gpu_engine(path), quantised(path)]
    for name, engine, other in (("from a GPU", *engines), ("from a CPU", *reversed(engines))):
        sequence, again = engine.runner.sequence(), other.runner.sequence()
        ids = [each % 500 for each in IDS]
        engine.runner.step([(sequence, ids[:50])])
        files = [tmp_path / f"{name} {n}" for n in range(2)]
        PromptCache(files[0], engine.model_file, torch.uint8).write(sequence, ids[:50])
        PromptCache(files[0], other.model_file, torch.uint8).read(again, 50)
        PromptCache(files[1], other.model_file, torch.uint8).write(again, ids[:50])
        assert files[0].read_bytes() == files[1].read_bytes()
        for layer in range(engine.config.block_count):
            for computed, read in zip(sequence.stored(layer), again.stored(layer), strict=True):
                assert computed.dtype == torch.float32
                assert torch.equal(computed.cpu(), read.cpu())
        logits = [runner.step([(each, ids[50:60])]).logits for runner, each in
                  ((engine.runner, sequence), (other.runner, again))]  # fmt: skip
        assert torch.linalg.norm(logits[0] - logits[1]) < 3e-3 * torch.linalg.norm(logits[1])


def test_beams_and_sequences_that_share_blocks_stay_apart(path):
    engine, reference = gpu_engine(path), quantised(path)
    beams, expected = (each.beam_search(IDS[:30], width=3, max_tokens=8) for each in (engine, reference))
    assert GPU or [beam.tokens for beam in beams] == [beam.tokens for beam in expected]
    for beam, other in zip(beams, expected, strict=True):
        assert abs(beam.score - other.score) < 1e-2
    alone = {n: engine.generate(IDS[:n], GREEDY, max_tokens=12).tokens for n in (40, 41, 70)}
    engine.runner.forget()
    for n in (70, 41, 40):
        same_text(reference, IDS[:n], engine.generate(IDS[:n], GREEDY, max_tokens=12).tokens, alone[n])


def test_preempted_sequences_go_on_from_host_memory(tmp_path):
    path = write_random_mixtral(tmp_path / "tiny.gguf", **MODELS["heads of 32"])
    engine = gpu_engine(path, context=512)
    runner, prompts = engine.runner, [[token + i % 7 for i in range(70)] for token in (20, 60, 100)]
    requests = [Request(ids, GREEDY, 80, ignore_eos=True, reuse=False) for ids in prompts]
    alone = [engine.start(request).run().tokens for request in requests]
    runner.forget()
    if GPU:
        assert len(runner.pool.offsets) >= 11
        runner.pool.capacity, runner.pool.room = 11, lambda: 0
    else:
        growing(runner, 11)
    runner._resume_costs = ResumeCosts(runner.chunk, lambda: Curve((1, 512), (1.0, 512.0)))  # copies pay
    store = runner.prefix_cache.store = HostStore(runner.pool, 40 * runner.kv_bytes(1), runner._resume_costs)
    scheduler, results = Scheduler(runner, BatchSize(3)), {}
    handles = [scheduler.add(engine.start(replace(request, reuse=True))) for request in requests]
    while not scheduler.idle:
        results |= {event.handle: event.result.tokens for event in scheduler.step() if isinstance(event, Finished)}
    assert store.saves >= store.loads > 0
    for handle, ids, tokens in zip(handles, prompts, alone, strict=True):
        same_text(quantised(path), ids, results[handle], tokens)


@on_gpu
def test_torch_encodes_the_same_bits_on_a_gpu():
    rows = torch.randn(3000, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 3000)[:, None]
    for ours, expected in zip(codes_and_scales(rows.cuda()), codes_and_scales(rows), strict=True):
        assert torch.equal(ours.cpu(), expected)
    assert torch.equal(encoded(rows.cuda()).cpu(), encoded(rows))


def check(logits, expected, rounding, precision):
    """Against Q8_0 on the CPU; rounding: what Q8_0 changes there.

    exact: nearly all codes are the same, but where a number lies between two. fast: in a quarter of the positions,
    since a router may choose another expert in others.
    """
    assert logits.isfinite().all()
    if precision == "exact":
        assert torch.linalg.norm(logits - expected) < 0.2 * torch.linalg.norm(rounding)
    else:
        errors = torch.linalg.norm(logits - expected, dim=1) / torch.linalg.norm(expected, dim=1)
        assert errors.quantile(0.25) <= 3e-2


@on_gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("residents", [None, 0, 3])
def test_graphs_kernels_and_torch_give_the_logits_of_a_cpu(path, precision, residents):
    """Single tokens through graphs, steps of several tokens through kernels, and both through torch without Triton."""
    ids = [each % 500 for each in IDS]
    expected = quantised(path).logits(ids)
    rounding = expected - fiddler.load(path, device="cpu", precision="exact").logits(ids)
    engine = quantised(path, device="cuda", precision=precision, gpu_experts=residents)
    runner = engine.runner
    assert runner.cache_dtype == runner.pool.memory.dtype == torch.uint8
    assert runner._decoder is not None
    check(engine.logits(ids), expected, rounding, precision)
    held = [runner.pool.take() for _ in range(runner.pool.available - 1)]
    check(one_by_one(engine, ids, 100), expected[-101:], rounding[-101:], precision)
    assert len(runner.pool.segments) > 1
    del held
    decoder, attention = runner._decoder, runner._attention
    runner.decode_with(None, runner._cos_sin, None)
    runner.forget()
    check(one_by_one(engine, ids, 5), expected[-6:], rounding[-6:], precision)
    runner.decode_with(decoder, runner._cos_sin, attention)


@on_gpu
@pytest.mark.parametrize("precision,kind", [("exact", "f16"), ("fast", "f32")])
def test_the_other_types_may_be_given_on_a_gpu_too(path, precision, kind):
    ids = [each % 500 for each in IDS]
    options = {"precision": precision, "cache_type_k": kind, "cache_type_v": kind}
    expected, engine = (fiddler.load(path, device=device, **options) for device in ("cpu", "cuda"))
    assert engine.runner.pool.memory.dtype == {"f16": torch.float16, "f32": torch.float32}[kind]
    expected = expected.logits(ids)
    sequence = engine.runner.sequence()
    single = [engine.runner.step([(sequence, [token])]).logits for token in ids]
    for logits in (engine.logits(ids), torch.cat(single)):
        errors = torch.linalg.norm(logits - expected, dim=1) / torch.linalg.norm(expected, dim=1)
        assert errors.max() <= 1e-3 if precision == "exact" else errors.quantile(0.25) <= 3e-2


@on_gpu
def test_the_pool_begins_with_34_bytes_for_32_numbers(path):
    half, engine = fiddler.load(path, device="cuda"), quantised(path, device="cuda", precision="fast")
    wide = {torch.float16: 64, torch.float32: 128}[half.runner.cache_dtype]
    assert half.runner.pool.memory.nbytes * 34 == engine.runner.pool.memory.nbytes * wide
    assert half.runner.kv_bytes(1000) * 34 == engine.runner.kv_bytes(1000) * wide


def attention_of(config, dtype, positions, count):
    """A call that stores and attends to blocks of this type: single rows of sequences, or those of one prompt."""
    from fiddler.gpu import attention_kernels

    single, blocks = count <= 64, -(-positions // POSITIONS)
    pool = GrowingPool(config, dtype, DEVICE, blocks * (count if single else 1), torch.float16)
    pool.memory.zero_()
    memories, index = pool.memory[0, 0], torch.arange(count, device=DEVICE)
    at, firsts = (index * 0 + positions - 1, index * blocks) if single else (index, index * 0)
    tables = attention_kernels.Tables(at, torch.from_numpy(pool.offsets).to(DEVICE), firsts)
    q = torch.randn(count, config.head_count, config.head_dim, device=DEVICE)
    k, out = torch.randn(count, config.head_count_kv, config.head_dim, device=DEVICE), torch.empty_like(q)
    rows, half = [(n, 1) for n in range(count)] if single else [(0, count)], torch.float16
    latent, cos_sin = config.latent is not None, cos_sin_of(config, positions).to(DEVICE)
    kernels = attention_kernels
    bounds, size = kernels.latent_tiles(rows, len(q[0]), half) if latent else kernels.tiles_of(rows, half)
    tiles = kernels.LatentTiles(bounds.to(DEVICE), size)

    def work():
        turned = kernels.rotate_and_store(q, k, k, cos_sin, tables, memories[0], None if latent else memories[1])
        if latent:
            kernels.attend_latent(turned, memories[0], tables, tiles, config.rotated, out, half)
        elif single:
            kernels.attend_rows(turned, memories[0], memories[1], tables, index, None, out)
        else:
            kernels.attend_tiles(turned, memories[0], memories[1], tables, tiles, None, out, half)

    return work


@on_gpu
@pytest.mark.parametrize("positions", [150, 4000, 32000])
def test_time_of_attention_over_each_type_is_printed(positions):
    """For `pytest -rP`: of Mixtral's heads and DeepSeek-V2-Lite's latents; a token, 64 sequences, and a prompt."""
    mixtral = Config(MIXTRAL, 64, 1 << 16, 4096, 1, 16, 32, 8, 128, 4, 2, 1e-5, 1e4)
    for config in (mixtral, replace(SHAPES["deepseek-v2-lite"], block_count=2, context_length=1 << 16)):
        for name, count in (("a token", 1), ("64 sequences", 64), ("a prompt", min(positions, 4000))):
            half, blocks = (replayed(attention_of(config, dtype, positions, count)) * 1e6 for dtype in TYPES)
            line = f"{config.architecture.name}, {positions} positions, {name}: {half:.1f} us, Q8_0 {blocks:.1f} us"
            sys.stdout.write(f"{line}, {blocks / half:.2f}\n")

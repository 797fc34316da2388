"""An engine whose runner is the GPU's, with the CPU in the GPU's place and on both sides of the orchestrator."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fiddler
from fiddler.engine import Engine
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.gpu.runner import GpuRunner
from fiddler.models.rotary import rotary_cos_sin
from fiddler.telemetry.recorder import SILENT
from oracles.both_sides_runner import runner_of_both_sides


def engine_in_place(path, *, least=40, attention=None, residents=None, dtype=torch.float32):
    """least: blocks of the pool. attention: `attention_kernels`, which Triton's interpreter runs; None: torch.

    dtype: of the KV cache.
    """
    engine = fiddler.load(path, device="cpu", precision="exact")
    config = engine.config
    placed = [[0] for _ in config.sparse_layers] if residents is None else residents
    both = runner_of_both_sides(path, SILENT, placed)
    pool = GrowingPool(config, dtype, torch.device("cpu"), least)
    budget = SimpleNamespace(total=1 << 40)
    runner = GpuRunner(both.model, both.orchestrator, engine.context, dtype, 1, 100, pool, budget)
    if attention is not None:
        runner.decode_with(None, cos_sin_of(config, engine.context), attention)
    return Engine(engine.model_file, engine.tokenizer, runner, "cpu", "", engine.backend, 0.0)


def cos_sin_of(config, context):
    return torch.view_as_real(rotary_cos_sin(config, torch.arange(context), rotated_alone=True))


def elastic_to(engine, capacity, before=None):
    """A pool of 4 blocks that grows by 2 at the residents' cost, to `capacity` once all are evicted.

    before: what this returned the last time; its evictions are undone.
    """
    runner = engine.runner
    while before is not None and before.evicted:
        before.restore()
    growing(runner, 4)
    pool, residents = runner.pool, runner.orchestrator.residents
    total = capacity * runner.kv_bytes(1)

    def room():
        resident = sum(residents.nbytes(layer, e) for layer, ids in enumerate(residents.by_layer()) for e in ids)
        return total - pool.capacity * runner.kv_bytes(1) - resident

    assert room() >= 0
    runner.share_budget(room)
    return runner._elastic._evictions


def growing(runner, capacity):
    """A new pool that begins with 4 blocks and grows by 2 at a time, to `capacity`; past sequences may hold all."""
    config, nbytes = runner.model.config, runner.kv_bytes(1)
    pool = GrowingPool(config, runner.cache_dtype, runner.pool.device, 4)
    pool._by = 2
    pool.room = lambda: (capacity - pool.capacity) * nbytes
    super(GpuRunner, runner).__init__(
        runner.model, runner.context, runner.cache_dtype, runner.threads, runner.chunk, pool
    )

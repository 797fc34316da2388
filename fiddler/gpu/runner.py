"""Runs steps where the dense part is on a GPU: several tokens through torch, one token as captured graphs.

Does not know where experts are computed, nor how the pool of blocks gets its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.memory_budget import Budget, shown
from fiddler.errors import ResourceError
from fiddler.gpu.elastic_budget import ElasticBudget
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.gpu.step import GpuStep
from fiddler.models.transformer import Transformer
from fiddler.offload.evictions import Evictions
from fiddler.offload.orchestrator import Orchestrator
from fiddler.runtime.block_pool import BlockPool
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.paged_runner import PagedRunner
from fiddler.runtime.resume_costs import ResumeCosts
from fiddler.runtime.runner import StepOutput
from fiddler.runtime.step import Step

if TYPE_CHECKING:
    from fiddler.gpu.decode_graphs import DecodeGraphs

__all__ = ["GpuRunner", "largest_of"]

_CURVE_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
_LOGITS_CHUNK = 256  # tokens per product with the output weight
_MOST_PINNED = 1 << 29  # bytes of the logits of a step in pinned memory


class GpuRunner(PagedRunner):
    """A `Runner` whose dense part is on a GPU, and whose KV caches are blocks of one pool there."""

    def __init__(
        self,
        model: Transformer,
        orchestrator: Orchestrator | None,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        chunk: int,
        pool: BlockPool,
        budget: Budget,
    ) -> None:
        """pool: has room for a sequence of the whole context, or grows to it. orchestrator: None without experts."""
        super().__init__(model, context, cache_dtype, threads, chunk, pool)
        self.budget = budget
        self.orchestrator = orchestrator
        self._kernel_threads = max(1, min(threads, kernels.usable_cores() - 1))
        self._decoder: DecodeGraphs | None = None
        self._attention: ModuleType | None = None
        self._cos_sin = torch.empty(0)
        self._elastic: ElasticBudget | None = None
        self._resume_costs: ResumeCosts | None = None

    def share_budget(self, room: Callable[[], int], later: int = 0) -> None:
        """Let the pool grow by up to `room` bytes, then at the cost of resident experts, and give it back later.

        later: bytes by which one sequence may let it grow.
        """
        assert isinstance(self.pool, GrowingPool), "the pool has one size"
        self.pool.room = room
        if self.orchestrator is not None:
            self._elastic = ElasticBudget(self.pool, room, Evictions(self.orchestrator), later)

    def store_in_host(self, nbytes: int) -> None:
        """Copy blocks that others need to up to so much of the host's memory, and back where that pays."""
        experts, curve = self.orchestrator, None
        if experts is not None and experts.incomplete:
            curve = partial(_step_seconds, experts, self.chunk, self.model.config.expert_used_count)
        self._resume_costs = ResumeCosts(self.chunk, curve)
        self.prefix_cache.store = HostStore(self.pool, nbytes, self._resume_costs)

    def decode_with(self, decoder: DecodeGraphs | None, cos_sin: Tensor, attention: ModuleType) -> None:
        """Run steps of one token of one sequence through `decoder`, and attention of others through its kernels.

        cos_sin: of every position, see `attention_kernels.rotate_and_store`. attention: that module.
        """
        self._decoder, self._cos_sin, self._attention = decoder, cos_sin, attention

    def _place(self, parts: Sequence[tuple[KVCache, int]]) -> Step:
        if self._attention is None:
            return super()._place(parts)
        return GpuStep(parts, self.model.config, self._cos_sin, self._attention)

    def _forward(self, ids: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        if self.orchestrator is None:
            return self.model(ids, step, wanted)
        # the worker thread keeps one core busy meanwhile: kernels would wait for a thread on that core
        kernels.set_threads(self._kernel_threads)
        return self.orchestrator.step(lambda: self.model(ids, step, wanted), len(ids if wanted is None else wanted))

    def resident_experts(self) -> list[list[int]]:
        """Implements `Runner.resident_experts`."""
        return [] if self.orchestrator is None else self.orchestrator.residents.by_layer()

    def room(self, weights: int) -> int | None:
        """Implements `Runner.room`: the size that the pool may have."""
        return self.pool.max_bytes

    def step_seconds(self) -> Curve | None:
        """Implements `Runner.step_seconds`: the plans' seconds of the experts; None for a model without any."""
        if self.orchestrator is None:
            return None
        return _step_seconds(self.orchestrator, self.chunk, self.model.config.expert_used_count)

    def resume(self, ids: Sequence[int], positions: int = 0) -> PagedKVCache:
        """Implements `Runner.resume`."""
        if self._decoder is not None:
            self._decoder.forget_ahead()
        with self._within_budget():
            return super().resume(ids, positions)

    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> PagedKVCache:
        """Implements `Runner.copy`."""
        with self._within_budget():
            return super().copy(source, target, shared)

    def compute(
        self,
        parts: Sequence[tuple[KVCache, Sequence[int]]],
        wanted: Sequence[int] | None,
        *,
        logits: bool,
        greedy: bool = False,
    ) -> StepOutput:
        """Implements `Runner.compute`. The hidden state of a single token is valid until the next step."""
        single = len(parts) == 1 and len(parts[0][1]) == 1 and (wanted is None or len(wanted) == 1)
        with self._within_budget():
            if self._elastic is not None:
                self._elastic.before_step(self.prefix_cache)
            if self._decoder is None or not single:
                return self._compute_several(parts, wanted, logits=logits)
            ((sequence, tokens),) = parts
            assert isinstance(sequence, PagedKVCache)
            sequence.reserve(sequence.length + 1)
            greedy = greedy and logits and _reserved(sequence, sequence.length + 2)
            table = self.pool.offsets[sequence.table]
            with self._on_threads(0) if self._decoder.uses_cpu else nullcontext():
                if self._decoder.uses_cpu:  # the worker thread keeps one core busy meanwhile
                    kernels.set_threads(self._kernel_threads)
                self._decoder.step(tokens[0], sequence.length, table, greedy=greedy)
            row = self._decoder.logits() if logits else None
            if row is None:
                self._decoder.without_logits()
            output = StepOutput(self._decoder.hidden, row, self._decoder.largest)
        sequence.advance(1)
        return output

    def _compute_several(
        self, parts: Sequence[tuple[KVCache, Sequence[int]]], wanted: Sequence[int] | None, *, logits: bool
    ) -> StepOutput:
        """`compute` of whatever the graphs do not compute."""
        if self._decoder is not None:
            self._decoder.forget_ahead()
        began = time.perf_counter()
        output = super().compute(parts, wanted, logits=logits)
        if self._resume_costs is not None:
            ended = output.logits is not None and len(output.logits) > 0  # which the GPU has sent
            tokens = sum(len(tokens) for _, tokens in parts)
            self._resume_costs.stepped(tokens, time.perf_counter() - began, ended=ended)
        return output

    def prefill(self, sequence: KVCache, tokens: Sequence[int]) -> Tensor:
        """Implements `Runner.prefill`."""
        with self._within_budget():
            return super().prefill(sequence, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Implements `Runner.logits`."""
        logits = self._host_logits(len(hidden))
        with self._within_budget():
            for begin, chunk in self._logits_by_chunk(hidden):
                logits[begin : begin + _LOGITS_CHUNK].copy_(chunk, non_blocking=True)
            _synchronize(self.pool.device)
        return logits

    def _output(self, hidden: Tensor) -> StepOutput:
        logits, largest = self._host_logits(len(hidden)), []
        for begin, chunk in self._logits_by_chunk(hidden):
            logits[begin : begin + _LOGITS_CHUNK].copy_(chunk, non_blocking=True)
            largest.append(largest_of(chunk))
        _synchronize(self.pool.device)
        return StepOutput(hidden, logits, torch.cat(largest).cpu().numpy() if largest else None)

    def _host_logits(self, rows: int) -> Tensor:
        """Memory for logits [rows, V]; pinned, which a copy takes a tenth of the time to, unless that were a lot."""
        size = self.model.config.vocab_size
        if self.pool.device.type == "cuda" and 4 * rows * size <= _MOST_PINNED:
            with suppress(RuntimeError):  # the driver may pin no more
                return torch.empty(rows, size, pin_memory=True)
        return torch.empty(rows, size)

    def _logits_by_chunk(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of each chunk of rows the first one, and its logits on the GPU, which may lack room for those of all."""
        for begin in range(0, len(hidden), _LOGITS_CHUNK):
            with torch.inference_mode():
                yield begin, self.model.logits(hidden[begin : begin + _LOGITS_CHUNK]).float()

    @contextmanager
    def _within_budget(self) -> Iterator[None]:
        """Turn running out of GPU memory, as with several sequences at once, into an error that names the remedy.

        First ends a step that was interrupted, and interrupted again while it ended: the GPU may wait at a semaphore
        that nobody opens, and everything in this context may wait for the GPU.
        """
        if self.orchestrator is not None:
            self.orchestrator.start_over()
        try:
            yield
        except torch.OutOfMemoryError as error:
            fewer = "" if self.orchestrator is None else "--gpu-experts, fewer than now, or "
            raise ResourceError(
                f"the GPU's memory does not suffice within {shown(self.budget.total)}; give {fewer}less --ctx"
            ) from error


def _step_seconds(orchestrator: Orchestrator, chunk: int, k: int) -> Curve:
    """Expected seconds of the experts of a step of up to `chunk` tokens, each of which chooses `k` in every layer."""
    counts = [count for count in _CURVE_TOKENS if count < chunk] + [chunk]
    return Curve(tuple(counts), tuple(orchestrator.step_seconds(count, k) for count in counts))


def largest_of(logits: Tensor) -> Tensor:
    """`StepOutput.largest` of logits [W, V], on their device."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def _synchronize(device: torch.device) -> None:
    """Wait for all that is queued on the GPU's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _reserved(sequence: PagedKVCache, length: int) -> bool:
    """Reserve memory for `length` positions, if the context and the pool allow it; whether they do."""
    if length > sequence.context:
        return False
    try:
        sequence.reserve(length)
    except ResourceError:
        return False
    return True

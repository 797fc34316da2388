"""Runs steps where the dense part is on a GPU: several tokens through torch, one token as captured graphs.

Knows the preallocated KV cache, to whose addresses the graphs are bound: one sequence at a time owns it, and a new one
takes it over once nobody holds the last owner. Does not know where experts are computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.memory_budget import Budget, shown
from fiddler.errors import ResourceError
from fiddler.gpu.contiguous_kv_cache import ContiguousKVCache, contiguous_kv_bytes
from fiddler.gpu.last_sequence import LastSequence
from fiddler.models.attention import attend
from fiddler.models.config import Config
from fiddler.models.transformer import Transformer
from fiddler.offload.orchestrator import Orchestrator
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.prefix_cache import common
from fiddler.runtime.runner import Runner, StepOutput, out_of_memory
from fiddler.runtime.step import Step

if TYPE_CHECKING:
    from fiddler.gpu.decode_graphs import DecodeGraphs

__all__ = ["GpuRunner"]

_CURVE_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
_LOGITS_CHUNK = 256  # tokens per product with the output weight


class _GpuStep(Step):
    """A `Step` whose rotary embedding and KV cache writes are one kernel."""

    def __init__(
        self, parts: Sequence[tuple[KVCache, int]], config: Config, cos_sin: Tensor, attention: ModuleType
    ) -> None:
        super().__init__(parts, config)
        self._cos_sin_table, self._attention = cos_sin, attention
        self._starts = torch.tensor([sequence.length for sequence, _ in parts]).to(cos_sin.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`."""
        outputs, begin = [], 0
        for i, (sequence, count) in enumerate(self._parts):
            rows, end = slice(begin, begin + count), sequence.length + count
            begin += count
            assert isinstance(sequence, ContiguousKVCache)
            keys, values = (tensors[layer] for tensors in sequence.storage)
            rotated = self._attention.rotate_and_store(
                q[rows], k[rows], v[rows], self._cos_sin_table, self._starts[i : i + 1], keys, values, keys.dtype
            )
            keys, values = (tensor[:, :end].transpose(0, 1) for tensor in (keys, values))
            outputs.append(attend(rotated, keys, values, self._config.window(layer), sinks))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class GpuRunner(Runner):
    """A `Runner` whose dense part is on a GPU."""

    def __init__(
        self,
        model: Transformer,
        orchestrator: Orchestrator | None,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        chunk: int,
        preallocated: ContiguousKVCache,
        budget: Budget,
    ) -> None:
        """preallocated: has room for the whole context; one sequence at a time uses its storage.

        orchestrator: None for a model without experts.
        """
        super().__init__(model, context, cache_dtype, threads, chunk)
        self.budget = budget
        self.orchestrator = orchestrator
        self._kernel_threads = max(1, min(threads, kernels.usable_cores() - 1))
        self._storage = preallocated.storage
        self._last_sequence = LastSequence()
        self._owner: Callable[[], ContiguousKVCache | None] = lambda: None  # the sequence that uses `_storage`
        self._decoder: DecodeGraphs | None = None
        self._attention: ModuleType | None = None
        self._cos_sin = torch.empty(0)

    def decode_with(self, decoder: DecodeGraphs, cos_sin: Tensor, attention: ModuleType) -> None:
        """Run single tokens of the preallocated KV cache through `decoder`, other steps through `attention`'s kernels.

        cos_sin: of every position, see `attention_kernels.rotate_and_store`.
        """
        self._decoder, self._cos_sin, self._attention = decoder, cos_sin, attention

    def _place(self, parts: Sequence[tuple[KVCache, int]]) -> Step:
        if self._attention is None:
            return super()._place(parts)
        return _GpuStep(parts, self.model.config, self._cos_sin, self._attention)

    def _forward(self, ids: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        if self.orchestrator is None:
            return self.model(ids, step, wanted)
        # the worker thread keeps one core busy meanwhile: kernels would wait for a thread on that core
        kernels.set_threads(self._kernel_threads)
        return self.orchestrator.step(lambda: self.model(ids, step, wanted), len(ids if wanted is None else wanted))

    def resident_experts(self) -> list[list[int]]:
        """Implements `Runner.resident_experts`."""
        return [] if self.orchestrator is None else self.orchestrator.residents.by_layer()

    def sequence(self, positions: int = 0) -> ContiguousKVCache:
        """Implements `Runner.sequence`. One sequence at a time uses the preallocated KV cache; others allocate."""
        if self._last_sequence.holds(self._owner()):
            self._last_sequence.drop()
        unowned = self._owner() is None
        sequence = ContiguousKVCache(
            self.model.config,
            self.context,
            self.cache_dtype,
            self.model.token_embd.device,
            self._storage if unowned else None,
        )
        if unowned:
            self._owner = weakref.ref(sequence)
        if positions:
            self._reserve(sequence, positions)
        return sequence

    def sequences(self, count: int, positions: int) -> list[KVCache]:
        """Implements `Runner.sequences`: in the memory of one."""
        return list(self.sequence().divided(count, positions))

    def _reserve(self, sequence: ContiguousKVCache, positions: int) -> None:
        with self._within_budget(), out_of_memory():
            sequence.reserve(positions)

    def kv_bytes(self, positions: int) -> int:
        """Implements `Runner.kv_bytes`."""
        return contiguous_kv_bytes(self.model.config, self.context, self.cache_dtype, positions)

    def room(self, weights: int) -> int | None:
        """Implements `Runner.room`: bytes left of the budget; the preallocated KV cache is part of what is used."""
        return max(0, self.budget.room())

    def step_seconds(self) -> Curve | None:
        """Implements `Runner.step_seconds`: the plans' seconds of the experts; None for a model without any."""
        if self.orchestrator is None:
            return None
        counts = [count for count in _CURVE_TOKENS if count < self.chunk] + [self.chunk]
        k = self.model.config.expert_used_count
        return Curve(tuple(counts), tuple(self.orchestrator.step_seconds(count, k) for count in counts))

    def matched(self, ids: Sequence[int]) -> int:
        """Implements `Runner.matched`."""
        return common(self._last_sequence.tokens, ids)

    def resume(self, ids: Sequence[int], positions: int = 0) -> ContiguousKVCache:
        """Implements `Runner.resume`. Without `ids`, the last sequence's memory is used again."""
        sequence = self._last_sequence.take(ids) or self.sequence()
        if positions:
            self._reserve(sequence, positions)
        return sequence

    def keep(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Implements `Runner.keep`, but only for the preallocated KV cache: another would cost memory and be slower."""
        if sequence is self._owner():
            assert isinstance(sequence, ContiguousKVCache)
            self._last_sequence.put(sequence, tokens)

    def forget(self) -> None:
        """Implements `Runner.forget`."""
        self._last_sequence.drop()

    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> ContiguousKVCache:
        """Implements `Runner.copy`."""
        with self._within_budget(), out_of_memory():
            target = self.sequence() if target is None else target
            assert isinstance(target, ContiguousKVCache)
            assert isinstance(source, ContiguousKVCache)
            target.become(source, shared)
            return target

    def step(
        self,
        parts: Sequence[tuple[KVCache, Sequence[int]]],
        wanted: Sequence[int] | None = None,
        *,
        logits: bool = True,
    ) -> StepOutput:
        """Implements `Runner.step`. The hidden state of a single token is valid until the next step."""
        single = len(parts) == 1 and len(parts[0][1]) == 1 and (wanted is None or len(wanted) == 1)
        with self._within_budget():
            if self._decoder is None or not single or parts[0][0] is not self._owner():
                return super().step(parts, wanted, logits=logits)
            ((sequence, tokens),) = parts
            sequence.reserve(sequence.length + 1)
            with self._on_threads(0) if self._decoder.uses_cpu else nullcontext():
                self._decoder.step(tokens[0], sequence.length)
            output = StepOutput(self._decoder.hidden, self._decoder.logits() if logits else None)
        sequence.length += 1
        return output

    def prefill(self, sequence: KVCache, tokens: Sequence[int]) -> Tensor:
        """Implements `Runner.prefill`."""
        with self._within_budget():
            return super().prefill(sequence, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Implements `Runner.logits`."""
        logits = torch.empty(len(hidden), self.model.config.vocab_size)
        with self._within_budget():  # in chunks: the GPU may lack room for the logits of a long step
            for begin in range(0, len(hidden), _LOGITS_CHUNK):
                logits[begin : begin + _LOGITS_CHUNK] = Runner.logits(self, hidden[begin : begin + _LOGITS_CHUNK])
        return logits

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

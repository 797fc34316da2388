"""Runs steps where the dense part is on a GPU: several tokens through torch, one token as captured graphs.

Knows one sequence's place on the GPU, which the next sequence takes over when nobody holds the last one any more.
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
from fiddler.device.memory_budget import Budget, shown
from fiddler.errors import ResourceError
from fiddler.models.attention import attend
from fiddler.models.config import Config
from fiddler.models.mixtral import Mixtral
from fiddler.runtime.kv_cache import KVCache, Step
from fiddler.runtime.runner import Runner

if TYPE_CHECKING:
    from fiddler.gpu.decode_graphs import DecodeGraphs

__all__ = ["GpuRunner"]

_LOGITS = 256  # tokens whose logits are computed at once


class _GpuStep(Step):
    """A `Step` through a kernel that rotates and stores at once."""

    def __init__(
        self, parts: Sequence[tuple[KVCache, int]], config: Config, cos_sin: Tensor, attention: ModuleType
    ) -> None:
        super().__init__(parts, config)
        self._of_all, self._attention = cos_sin, attention
        self._starts = torch.tensor([sequence.length for sequence, _ in parts]).to(cos_sin.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The model's `Cache`."""
        made, begin = [], 0
        for i, (sequence, count) in enumerate(self._parts):
            rows, end = slice(begin, begin + count), sequence.length + count
            begin += count
            keys, values = (prefix_cache[layer] for prefix_cache in sequence.storage)
            turned = self._attention.rotate_and_store(
                q[rows], k[rows], v[rows], self._of_all, self._starts[i : i + 1], keys, values, keys.dtype
            )
            keys, values = (prefix_cache[:, :end].transpose(0, 1) for prefix_cache in (keys, values))
            made.append(attend(turned, keys, values, self._config.sliding_window))
        return made[0] if len(made) == 1 else torch.cat(made)


class GpuRunner(Runner):
    """A `Runner` on a GPU."""

    def __init__(
        self,
        model: Mixtral,
        beside: Callable[[Callable[[], Tensor], int], Tensor],
        start_over: Callable[[], None],
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        chunk: int,
        home: KVCache,
        budget: Budget,
    ) -> None:
        """beside: runs a step of the model, and computes meanwhile what it leaves to the CPU; an `Orchestrator`'s.
        start_over: ends what a step that was interrupted, and interrupted again while it ended, has left: the GPU may
        stand at a gate that nobody opens, and whoever waits for the GPU then waits for good.

        home: a sequence with room for the whole context, whose storage the others use after it.
        """
        super().__init__(model, context, cache_dtype, threads, chunk)
        self.budget = budget
        self._beside, self._start_over = beside, start_over
        self._threads_beside = max(1, min(threads, kernels.usable_cores() - 1))
        self._storage = home.storage
        self._at_home: Callable[[], KVCache | None] = lambda: None
        self._decoder: DecodeGraphs | None = None
        self._attention: ModuleType | None = None
        self._cos_sin = torch.empty(0)

    def decode_with(self, decoder: DecodeGraphs, cos_sin: Tensor, attention: ModuleType) -> None:
        """Take single tokens of the sequence at home through `decoder`, others through `attention`'s kernels.

        turns: of every position, see `attention_kernels.rotate_and_store`.
        """
        self._decoder, self._cos_sin, self._attention = decoder, cos_sin, attention

    def _place(self, parts: Sequence[tuple[KVCache, int]]) -> Step:
        if self._attention is None:
            return super()._place(parts)
        return _GpuStep(parts, self.model.config, self._cos_sin, self._attention)

    def _forward(self, ids: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        # all this while the side thread queues, a core's work: a kernel's thread on that core would be waited for
        kernels.set_threads(self._threads_beside)
        return self._beside(lambda: self.model(ids, step, wanted), len(ids if wanted is None else wanted))

    def sequence(self, positions: int = 0) -> KVCache:
        """A `Runner`'s. The first one in use has its memory already, another one takes more."""
        if self.prefix_cache.holds(self._at_home()):
            self.prefix_cache.drop()
        home = self._at_home() is None
        made = KVCache(
            self.model.config,
            self.context,
            self.cache_dtype,
            self.model.token_embd.device,
            self._storage if home else None,
        )
        if home:
            self._at_home = weakref.ref(made)
        if positions:
            with self._within_budget():
                made.reserve(positions)
        return made

    def room(self, weights: int) -> int | None:
        """A `Runner`'s: what is left of the budget, the sequence at home not counted."""
        return max(0, self.budget.room())

    def keep(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """A `Runner`'s, but only the sequence at home: another one would cost memory, and be slower."""
        if sequence is self._at_home():
            super().keep(sequence, tokens)

    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> KVCache:
        """A `Runner`'s."""
        with self._within_budget():
            return super().copy(source, target, shared)

    def step(self, parts: Sequence[tuple[KVCache, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        """A `Runner`'s. What it returns for a single token is valid until the next step."""
        one = len(parts) == 1 and len(parts[0][1]) == 1 and (wanted is None or len(wanted) == 1)
        with self._within_budget():
            if self._decoder is None or not one or parts[0][0] is not self._at_home():
                return super().step(parts, wanted)
            ((sequence, tokens),) = parts
            sequence.reserve(sequence.length + 1)
            with self._on_threads(0) if self._decoder.uses_cpu else nullcontext():
                self._decoder.step(tokens[0], sequence.length)
        sequence.length += 1
        return self._decoder.hidden

    def prefill(
        self, sequence: KVCache, tokens: Sequence[int], on_chunk: Callable[[int], None] = lambda read: None
    ) -> Tensor:
        """A `Runner`'s."""
        with self._within_budget():
            return super().prefill(sequence, tokens, on_chunk)

    def logits(self, hidden: Tensor) -> Tensor:
        """A `Runner`'s."""
        if self._decoder is not None and hidden is self._decoder.hidden:
            return self._decoder.logits()
        made = torch.empty(len(hidden), self.model.config.vocab_size)
        with self._within_budget():  # in pieces: a step may be longer than there is room for all its logits
            for begin in range(0, len(hidden), _LOGITS):
                made[begin : begin + _LOGITS] = Runner.logits(self, hidden[begin : begin + _LOGITS])
        return made

    @contextmanager
    def _within_budget(self) -> Iterator[None]:
        """Says what helps where the GPU's memory does not suffice, as with several sequences at once.

        Begins by ending what was broken off, since all that is done here may wait for the GPU.
        """
        self._start_over()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the GPU's memory does not suffice within {shown(self.budget.total)}; give --gpu-experts, fewer than "
                "now, or less --ctx"
            ) from error

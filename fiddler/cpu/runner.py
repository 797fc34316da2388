"""Runs steps on the CPU: single tokens of a few sequences in one compiled call, others through the model.

Knows where the weights lie; computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cpu.layers import FEW
from fiddler.models.mixtral import Mixtral
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner, out_of_memory
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["CpuRunner"]


class CpuRunner(Runner):
    """A `Runner` on the CPU."""

    def __init__(
        self,
        model: Mixtral,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        decoder: kernels.CompiledDecodeStep | None,
        recorder: Recorder,
    ) -> None:
        """decoder: takes single tokens through all of the model; None: they go the way of all others."""
        super().__init__(model, context, cache_dtype, threads)
        self._decoder, self._recorder = decoder, recorder
        self._experts = model.experts
        self._last = torch.empty(0), torch.empty(0)  # hidden states of a step of single tokens, and their logits

    def step(self, parts: Sequence[tuple[KVCache, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        """A `Runner`'s."""
        all_wanted = wanted is None or len(wanted) == len(parts)
        counted = self.model.experts is not self._experts  # by someone who looks at what they are given
        if (
            self._decoder is None
            or counted
            or not (all_wanted and 0 < len(parts) <= FEW)
            or any(len(tokens) != 1 for _, tokens in parts)
        ):
            return super().step(parts, wanted)
        sequences, before = [sequence for sequence, _ in parts], kernels.thread_count()
        assert len({id(sequence) for sequence in sequences}) == len(sequences), "a sequence stands twice in a step"
        with out_of_memory():
            for sequence in sequences:
                sequence.reserve(sequence.length + 1)
        kernels.set_threads(self.threads)
        try:
            *made, products = self._decoder.step(
                [tokens[0] for _, tokens in parts],
                [sequence.pointers for sequence in sequences],
                [sequence.length for sequence in sequences],
            )
        finally:
            kernels.set_threads(before)
        for sequence in sequences:
            sequence.length += 1
        if self._recorder is not SILENT:
            for span in self._decoder.spans(products):
                self._recorder.did(*span)
        hidden, logits = (torch.from_numpy(array) for array in made)
        self._last = hidden, logits  # at once: another thread may be here, too
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """A `Runner`'s; those of the last step's single tokens were computed with them, and are given once."""
        known, logits = self._last
        if hidden is not known:
            return super().logits(hidden)
        self._last = torch.empty(0), torch.empty(0)
        return logits

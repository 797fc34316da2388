"""Runs steps on the CPU: a compiled decode step for up to 32 sequences, the model in torch for all other steps.

Knows runners and KV caches; not weights, nor how either way computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.cpu.layers import MAX_KERNEL_TOKENS
from fiddler.models.transformer import Transformer
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.paged_runner import PagedRunner
from fiddler.runtime.runner import Runner, StepOutput, out_of_memory
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["CpuRunner", "chunk_of"]

_MANY_CPUS = 16


def chunk_of(cpus: int) -> int:
    """The most tokens of a step on a machine with so many logical CPUs, however many a process uses.

    The more cores share the memory, the more tokens must share what it reads: 16 cores with AMX take 461 us a token of
    512, 331 of 1024 (two layers of Mixtral's shape, 2026-11-30); two cores of a Zen 5 the same of 512, 1024 and 2048.
    """
    return 1024 if cpus >= _MANY_CPUS else 512


class CpuRunner(PagedRunner):
    """A `Runner` on the CPU."""

    def __init__(
        self,
        model: Transformer,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        decoder: kernels.CompiledDecodeStep | None,
        recorder: Recorder,
        measure: Callable[[Runner], Curve],
    ) -> None:
        """decoder: the compiled decode step; None: single tokens go through the model, as all others.

        measure: the seconds of its steps, see `step_timing`.
        """
        super().__init__(model, context, cache_dtype, threads, chunk_of(os.cpu_count() or 1))
        self._decoder, self._recorder, self._measure = decoder, recorder, measure
        self._curve: Curve | None = None

    def step_seconds(self) -> Curve:
        """Implements `Runner.step_seconds`: measured where nobody did so before, on this machine."""
        if self._curve is None:
            self._curve = self._measure(self)
        return self._curve

    def compute(
        self,
        parts: Sequence[tuple[KVCache, Sequence[int]]],
        wanted: Sequence[int] | None,
        *,
        logits: bool,
        greedy: bool = False,
    ) -> StepOutput:
        """Implements `Runner.compute`."""
        del greedy
        all_wanted = wanted is None or len(wanted) == len(parts)
        if (
            self._decoder is None
            or not (all_wanted and 0 < len(parts) <= MAX_KERNEL_TOKENS)
            or any(len(tokens) != 1 for _, tokens in parts)
        ):
            return super().compute(parts, wanted, logits=logits)
        sequences = [sequence for sequence, _ in parts if isinstance(sequence, PagedKVCache)]
        assert len(sequences) == len(parts)
        assert self.pool.array is not None
        threads_before = kernels.thread_count()
        assert len({id(sequence) for sequence in sequences}) == len(sequences), "a sequence stands twice in a step"
        with out_of_memory():
            for sequence in sequences:
                sequence.reserve(sequence.length + 1)
        kernels.set_threads(self.threads)
        try:
            *outputs, spans = self._decoder.step(
                [tokens[0] for _, tokens in parts],
                self.pool.array,
                [sequence.table for sequence in sequences],
                [sequence.length for sequence in sequences],
            )
        finally:
            kernels.set_threads(threads_before)
        if self._recorder.wants_expert_ids:  # before the step is committed: the recorder may break it off
            for layer, expert_ids in enumerate(torch.from_numpy(spans.expert_ids)):
                self._recorder.chosen(layer, expert_ids)
        for sequence in sequences:
            sequence.advance(1)
        if self._recorder is not SILENT:
            for span in self._decoder.spans(spans):
                self._recorder.did(*span)
        hidden, computed = (torch.from_numpy(array) for array in outputs)
        return StepOutput(hidden, computed if logits else None)

"""The GPU's part of a layer of several tokens: residents, prefetched parts and streamed rows, queued in that order.

Knows tensors, the staging ring and a split; not how the split was planned. Works on any torch device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.offload.expert_biases import ExpertBiases, JobBiases, first_row
from fiddler.offload.expert_cache import Residents
from fiddler.offload.feed_forward import Job, Matrix, feed_forward, torch_type
from fiddler.offload.staging_ring import Part, Ring
from fiddler.telemetry.recorder import Recorder

__all__ = ["GpuSide", "Grouped", "SortedInputs", "prompt_decode_bytes"]


_DECODED_BYTES = 64 << 20, 384 << 20  # the larger one holds an expert of Mixtral-8x7B
_DECODED_SHARE = 48  # it is at most such a part of what experts lose by it


def prompt_decode_bytes(layers: Sequence[ExpertWeights], spare: int, *, exact: bool) -> int:
    """Memory in which a prompt's quantised experts are decoded to 16 bits, where `spare` bytes are left for experts.

    One of two sizes, of which the costs of experts depend; 0 where none is decoded so.
    """
    if exact or not any(weights.quantised for weights in layers):
        return 0
    small, large = _DECODED_BYTES
    return large if spare >= _DECODED_SHARE * (large - small) else small


class Grouped(Protocol):
    """Computes several tokens of several experts on the GPU: see `grouped_kernels`."""

    @property
    def decoded_bytes(self) -> int:
        """Memory for experts that are decoded beforehand."""
        ...

    def experts_of_many(
        self,
        x: Tensor,
        token: Tensor,
        routing_weights: Tensor,
        jobs: Sequence[Job],
        max_rows: int,
        into: Tensor,
        workspace_bytes: int,
        weights: ExpertWeights,
        biases: JobBiases | None,
    ) -> None:
        """Add several experts' results to `into`, with 16-bit products."""
        ...

    def add_from_host(self, into: Tensor, pinned: Tensor) -> None:
        """Add the CPU's sums, in pinned memory, to `into`."""
        ...


class SortedInputs(NamedTuple):
    """A layer's inputs in the order by expert, and its output."""

    inputs: Tensor  # [T, D], in the weights' type where activations are rounded to it
    token: Tensor  # [T * K], the row of `inputs` at each position
    routing_weights: Tensor  # [T * K]
    first: np.ndarray  # int64 [E + 1], the first position of each expert
    weights: ExpertWeights  # of the layer
    rounded: bool  # activations are
    y: Tensor  # [T, D] float32
    layer: int = 0

    def positions(self, expert: int) -> slice:
        """Where an expert's tokens are."""
        return slice(self.first[expert], self.first[expert + 1])


class GpuSide:
    """Queues the GPU's part of a layer."""

    def __init__(
        self,
        residents: Residents,
        ring: Ring,
        workspace_bytes: int,
        recorder: Recorder,
        grouped: Grouped | None,
        biases: ExpertBiases | None = None,
    ) -> None:
        """workspace_bytes: for temporaries, see `feed_forward`. grouped: None computes the experts one by one."""
        self._residents, self._ring, self._recorder = residents, ring, recorder
        self._workspace_bytes, self._grouped, self._biases = workspace_bytes, grouped, biases

    def add_experts(
        self,
        w: ExpertWeights,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        routing_weights: Tensor,
        first: np.ndarray,
        gpu_rows: dict[int, int],
        prefetched: Sequence[Sequence[Part]],
        y: Tensor,
    ) -> None:
        """Add to y [T, D] the residents of the layer and the last `gpu_rows` hidden rows of each missing expert.

        And the biases of down of all experts, the CPU's included.
        x [T, D], expert_ids and routing_weights [T, K], on the GPU; first: see `tokens_by_expert`. prefetched: parts
        of this layer that were sent before, of one slot of the ring after the other.
        """
        rounded, dtype = w.variant.activations != "f32", torch_type(w)
        order = torch.argsort(expert_ids.reshape(-1), stable=True)
        inputs = x.to(dtype) if rounded else x
        sorted_weights = routing_weights.reshape(-1)[order]
        this = SortedInputs(inputs, order // expert_ids.shape[1], sorted_weights, first, w, rounded, y, layer)
        if self._biases is not None:
            self._biases.add_down(layer, expert_ids, routing_weights, y)
        self._add_residents(this, layer, w.gate.shape[1])
        for parts in prefetched:
            self.add_parts(this, [part for part in parts if part.expert in gpu_rows])
            self._ring.done(parts)
        self._add_streamed(this, w, layer, gpu_rows, prefetched)

    def add_host_sums(self, y: Tensor, pinned: Tensor) -> None:
        """Add the CPU's sums [T, D], in pinned memory, to y."""
        if self._grouped is not None:
            self._grouped.add_from_host(y, pinned)
        else:
            y += pinned.to(y.device, non_blocking=True)

    def _add_residents(self, this: SortedInputs, layer: int, hidden: int) -> None:
        used = (e for e in range(len(this.first) - 1) if this.first[e + 1] > this.first[e])
        resident = [e for e in used if (layer, e) in self._residents]
        if this.rounded and self._grouped is not None:
            if resident:
                jobs = [self._job(this, e, self._residents.addresses(layer, e), 0, hidden) for e in resident]
                self._add_grouped(this, jobs, hidden)
            return
        for e in resident:
            self._add_one(this, e, self._residents[layer, e], 0)

    def _add_streamed(
        self,
        this: SortedInputs,
        w: ExpertWeights,
        layer: int,
        gpu_rows: dict[int, int],
        prefetched: Sequence[Sequence[Part]],
    ) -> None:
        hidden: int = w.gate.shape[1]
        ends = dict.fromkeys(gpu_rows, hidden)
        for parts in prefetched:
            for part in parts:
                if part.expert in ends:
                    ends[part.expert] -= part.end - part.begin
        row_ranges = [(e, hidden - rows, ends[e]) for e, rows in gpu_rows.items() if hidden - rows < ends[e]]
        with self._recorder.span("copy", sum(end - begin for _, begin, end in row_ranges) * w.hidden_row_bytes):
            for parts in self._ring.send(layer, row_ranges):
                self.add_parts(this, parts)
                self._ring.done(parts)

    def add_parts(self, this: SortedInputs, parts: Sequence[Part]) -> None:
        """Add parts of one slot, at once where kernels can."""
        if not parts:
            return
        parts[0].arrived.wait()
        if this.rounded and self._grouped is not None:
            jobs = [self._job(this, part.expert, part.addresses, part.begin, part.end) for part in parts]
            self._add_grouped(this, sorted(jobs, key=lambda job: job.first), max(job.rows for job in jobs))
            return
        for part in parts:
            self._add_one(this, part.expert, part.matrices(), part.begin)

    @staticmethod
    def _job(this: SortedInputs, expert: int, addresses: tuple[int, int, int], begin: int, end: int) -> Job:
        """The tokens of an expert, for its hidden rows [begin, end)."""
        experts, hidden, _ = this.weights.shape
        biases = first_row(this.layer, expert, experts, hidden, begin)
        return Job(addresses, end - begin, int(this.first[expert]), int(this.first[expert + 1]), biases)

    def _add_grouped(self, this: SortedInputs, jobs: Sequence[Job], max_rows: int) -> None:
        """Add several experts at once, in 16 bits."""
        assert self._grouped is not None
        with self._recorder.queued("experts"):
            self._grouped.experts_of_many(
                *(this.inputs, this.token, this.routing_weights, jobs, max_rows, this.y, self._workspace_bytes),
                *(this.weights, None if self._biases is None else self._biases.hidden),
            )

    def _add_one(self, this: SortedInputs, expert: int, matrices: tuple[Matrix, Matrix, Matrix], begin: int) -> None:
        """Add one expert's hidden rows from `begin` on, in plain torch."""
        positions, biases = this.positions(expert), None
        rows = this.token[positions]
        if self._biases is not None:
            biases = self._biases.of_rows(this.layer, expert, begin, begin + len(matrices[0]))
        with self._recorder.queued("experts"):
            output = feed_forward(
                *(this.inputs[rows], *matrices),
                rounded=this.rounded,
                work=self._workspace_bytes,
                biases=biases,
                clamped=this.weights.clamped,
            )
            this.y.index_add_(0, rows, output.mul_(this.routing_weights[positions, None]))

"""Streamed experts of one token: their copies through the staging ring, and captured kernels that read it there.

Knows the ring and the kernels' job list; not how work is divided, nor the rest of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.files.weights import ExpertWeights
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.staging_ring import Part, RowRange
from fiddler.telemetry.recorder import Recorder

__all__ = ["StreamedExperts"]


class _Sent(NamedTuple):
    """Streamed experts of a layer: their parts in the ring, and those that the ring had no room for."""

    layer: int
    expert_ids: Sequence[int]  # all of the token's
    parts: list[Part]
    unsent: list[RowRange]


class StreamedExperts:
    """Streams missing experts of the one token whose inputs lie at fixed addresses."""

    def __init__(self, orchestrator: Orchestrator, inputs: Tensor, y: Tensor, recorder: Recorder) -> None:
        """inputs: float32 [D + K] on the GPU, the token's x and routing weights; y: float32 [1, D], to add to."""
        self._ring, self._layers, self._recorder = orchestrator.ring, orchestrator.layers, recorder
        self._inputs, self._y = inputs, y
        k = len(inputs) - y.shape[1]
        self._jobs = torch.zeros(k, 5, dtype=torch.int64, device=inputs.device)
        self._host_jobs = torch.zeros(k, 5, dtype=torch.int64, pin_memory=inputs.device.type == "cuda")
        self._numbers = self._host_jobs.numpy().reshape(-1)
        self._graphs: dict[tuple[WeightFormat, ...], torch.cuda.CUDAGraph] = {}
        self._computed = torch.cuda.Event()  # recorded after the streamed experts of `_layer`
        self._layer = -1
        self._sent: _Sent | None = None

    def begin(self) -> None:
        """Begin a token: nothing of it is sent."""
        self._layer, self._sent = -1, None

    def computed(self, layer: int) -> bool:
        """Whether the streamed experts of this layer are computed already."""
        return self._layer == layer and self._computed.query()

    def send(self, layer: int, expert_ids: Sequence[int], gpu_rows: dict[int, int]) -> None:
        """Queue copies of the last `gpu_rows` hidden rows of experts, as many as the ring holds."""
        weights = self._layers[layer]
        hidden, room = weights.gate.shape[1], self._ring.rows * self._ring.slots
        unsent = [
            (e, begin, min(begin + room, hidden))
            for e, rows in gpu_rows.items()
            for begin in range(hidden - rows, hidden, room)
        ]
        with self._recorder.span("copy", sum(gpu_rows.values()) * weights.hidden_row_bytes):
            self._sent = self._send_some(_Sent(layer, expert_ids, [], unsent))

    def queue(self) -> None:
        """Queue the kernels of the experts that were sent, after their copies; and whatever was left to send."""
        sent, stream = self._sent, torch.cuda.current_stream()
        assert sent is not None
        graph = self._graphs[self._layers[sent.layer].matrix_formats]
        while True:
            jobs = [
                number
                for part in sent.parts
                for number in (*part.addresses, part.end - part.begin, sent.expert_ids.index(part.expert))
            ]
            self._numbers[:] = jobs + [0] * (len(self._numbers) - len(jobs))
            cuda_driver.copy_to_device(
                self._jobs.data_ptr(), self._host_jobs.data_ptr(), self._host_jobs.nbytes, stream.cuda_stream
            )
            sent.parts[0].arrived.wait()
            with self._recorder.queued("experts"):
                graph.replay()
            self._ring.done_together()
            if not sent.unsent:
                break
            stream.synchronize()  # the queued copy reads `_host_jobs`
            sent = self._send_some(sent)
        self._computed.record(stream)
        self._layer = sent.layer

    def run(self) -> None:
        """Run the kernels of each type of weights once, which compiles them."""
        for weights in self._of_each_kind():
            self._run(weights)

    def capture(self, captured: Callable[[], AbstractContextManager[torch.cuda.CUDAGraph]]) -> None:
        """Capture the kernels of each type of weights as a graph. captured: a context that captures one."""
        for weights in self._of_each_kind():
            with captured() as self._graphs[weights.matrix_formats]:
                self._run(weights)

    def _of_each_kind(self) -> list[ExpertWeights]:
        """A layer of each combination of formats of gate, up and down."""
        return list({weights.matrix_formats: weights for weights in self._layers}.values())

    def _send_some(self, sent: _Sent) -> _Sent:
        """Queue the next copies, as many as the ring holds."""
        count, rows = 0, 0
        for _, begin, end in sent.unsent:
            rows += end - begin
            if rows > self._ring.rows * self._ring.slots:
                break
            count += 1
        parts = self._ring.send_together(sent.layer, sent.unsent[:count])
        return sent._replace(parts=parts, unsent=sent.unsent[count:])

    def _run(self, weights: ExpertWeights) -> None:
        width = self._y.shape[1]
        experts_of_one(
            self._inputs[None, :width],
            self._jobs,
            self._inputs[width:],
            min(weights.gate.shape[1], self._ring.rows * self._ring.slots),
            weights,
            expert_ids=None,
            into=self._y,
            add=True,
        )

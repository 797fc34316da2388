"""Streamed experts of one token: their copies through the staging ring, and captured kernels that read it there.

Knows the ring and the kernels' job list; not how work is divided, nor the rest of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.files.weights import ExpertWeights
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.kernels.one_token import JOB
from fiddler.offload.one_token import OneToken, TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.staging_ring import RowRange
from fiddler.telemetry.recorder import Recorder

__all__ = ["StreamedExperts"]


class _Sent(NamedTuple):
    """Streamed experts of a layer, whose jobs are written, and those that the ring had no room for."""

    layer: int
    unsent: list[RowRange]


class StreamedExperts:
    """Streams missing experts of the one token whose inputs lie at fixed addresses."""

    def __init__(
        self, orchestrator: Orchestrator, token: OneToken, inputs: Tensor, y: Tensor, recorder: Recorder
    ) -> None:
        """token: divides the layers. inputs: float32 [D + K] on the GPU, its x and routing weights.

        y: float32 [1, D], to add to.
        """
        self._ring, self._layers, self._recorder = orchestrator.ring, orchestrator.layers, recorder
        self._inputs, self._y = inputs, y
        k = len(inputs) - y.shape[1]
        self._jobs = torch.zeros(k, JOB, dtype=torch.int64, device=inputs.device)
        self._host_jobs = torch.zeros(k, JOB, dtype=torch.int64, pin_memory=inputs.device.type == "cuda")
        self._numbers = self._host_jobs.numpy()
        self._token = token
        self._ring.bind_token(token.division, self._numbers)
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

    def send(self, layer: int, plan: TokenPlan) -> None:
        """Queue copies of the layer that was divided last, as many as the ring holds, and write the kernels' jobs.

        The jobs before are copied already: this layer's inputs came from the same stream after them.
        """
        weights = self._layers[layer]
        with self._recorder.span("copy", plan.gpu_rows * weights.hidden_row_bytes):
            if self._ring.send_token(layer, plan):
                self._sent = _Sent(layer, [])
                return
            hidden, room, ids = weights.gate.shape[1], self._ring.rows * self._ring.slots, self._token.expert_ids[0]
            unsent = [
                (int(ids[j]), begin, min(begin + room, hidden))
                for j, rows in self._token.gpu_rows[: plan.parts].tolist()
                for begin in range(hidden - rows, hidden, room)
            ]
            self._sent = self._send_some(_Sent(layer, unsent))

    def queue(self) -> None:
        """Queue the kernels of the experts that were sent, after their copies; and whatever was left to send."""
        sent, stream = self._sent, torch.cuda.current_stream()
        assert sent is not None
        graph = self._graphs[self._layers[sent.layer].matrix_formats]
        while True:
            cuda_driver.copy_to_device(
                self._jobs.data_ptr(), self._host_jobs.data_ptr(), self._host_jobs.nbytes, stream.cuda_stream
            )
            self._ring.arrived.wait()
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
        """Queue the next copies, as many as the ring holds, and write their jobs."""
        count, rows = 0, 0
        for _, begin, end in sent.unsent:
            rows += end - begin
            if rows > self._ring.rows * self._ring.slots:
                break
            count += 1
        parts = self._ring.send_together(sent.layer, sent.unsent[:count])
        expert_ids = self._token.expert_ids[0].tolist()
        assert len(parts) <= len(self._numbers)
        self._numbers[:] = 0
        for job, part in zip(self._numbers, parts, strict=False):
            job[:] = *part.addresses, part.end - part.begin, expert_ids.index(part.expert)
        return sent._replace(unsent=sent.unsent[count:])

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

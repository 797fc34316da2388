"""Streamed experts of one token: their copies through the staging ring, and captured kernels that read it there.

Knows the ring, the kernels' job list and the signals between both; not how work is divided, nor the rest of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.kernels.one_token import NOT_YET, Signal
from fiddler.kernels.token_copies import JOB
from fiddler.offload.one_token import TokenInputs, TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.token_signals import TokenSignals
from fiddler.telemetry.recorder import Recorder

__all__ = ["StreamedExperts"]


class StreamedExperts:
    """Streams missing experts of the one token whose inputs lie at fixed addresses.

    A layer that has more than the ring holds is streamed in chunks. Each is a wait for its copies, kernels that compute
    the chunk's jobs, if it has any, and a signal that they are computed. `signals` has their numbers.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        on_host: TokenInputs,
        inputs: Tensor,
        y: Tensor,
        recorder: Recorder,
    ) -> None:
        """on_host: the token's arrays there.

        inputs: float32 [D + K] on the GPU, its x and routing weights. y: float32 [1, D], to add to.
        """
        self._ring, self._layers, self._recorder = orchestrator.ring, orchestrator.layers, recorder
        self._biases = None if orchestrator.biases is None else orchestrator.biases.hidden
        k = len(inputs) - y.shape[1]
        self.signals = TokenSignals(self._ring.token_chunks(k), pinned=True)
        token = orchestrator.bind_token(on_host, self.signals)
        self._inputs, self._y = inputs, y
        self._rows = min(self._layers[0].gate.shape[1], self._ring.token_rows)
        self._jobs = torch.zeros(self._ring.token_chunks(k), k, JOB, dtype=torch.int64, device=inputs.device)
        host_jobs = torch.zeros(self._jobs.shape, dtype=torch.int64, pin_memory=inputs.device.type == "cuda")
        self._copies = self._ring.token_copies(token.division, host_jobs.numpy(), self._jobs.data_ptr())
        self._host_jobs = host_jobs  # their memory is pinned as long as this
        self._graphs: dict[tuple[WeightFormat, ...], list[torch.cuda.CUDAGraph]] = {}

    def begin(self) -> None:
        """Begin a token: its copies may use the ring."""
        self._ring.begin_token()

    def send(self, layer: int, number: int, plan: TokenPlan) -> None:
        """Queue the copies of a layer that is divided, on the thread that divided it."""
        nbytes, weight_copy = plan.gpu_rows * self._layers[layer].hidden_row_bytes, self._ring.weight_copy
        with self._recorder.queued("copy", nbytes, weight_copy.stream):
            weight_copy.check(self._copies.send(layer, number))

    def send_when_divided(self, layer: int, number: int) -> bool:
        """Queue the copies of a layer once it is divided, unless they are; False where it was not for 0.5 ms."""
        if self._recorder.wants_queued:  # the thread that divides it sends
            time.sleep(1e-4)
            return self.signals.is_at(Signal.DIVIDED, number)
        result = self._copies.send_when_divided(layer, number)
        if result == NOT_YET:
            return False
        self._ring.weight_copy.check(result)
        return True

    @property
    def chunks(self) -> int:
        """The most chunks of a layer."""
        return len(self._jobs)

    def queue(self, layer: int, number: int) -> None:
        """Queue the captured kernels of a layer's streamed experts, with a wait for the copies of each chunk."""
        for chunk, graph in enumerate(self._graphs[self._layers[layer].matrix_formats]):
            self.signals.wait(Signal.SENT, self.signals.chunk(number, chunk))
            with self._recorder.queued("experts"):
                graph.replay()
            self.signals.write(Signal.COMPUTED, self.signals.chunk(number, chunk))

    def computed(self, number: int) -> bool:
        """Whether the streamed experts of the layer with this number are computed already."""
        return self.signals.is_at(Signal.COMPUTED, self.signals.chunk(number, self.chunks - 1))

    def run(self) -> None:
        """Run the kernels of each type of weights and each chunk once, which compiles them."""
        for weights in self._of_each_kind():
            for chunk in range(self.chunks):  # their addresses may be aligned differently
                self._run(weights, chunk)

    def run_chunk(self, layer: int, chunk: int) -> None:
        """Run the kernels of the jobs of a chunk of a layer, which are there."""
        self._run(self._layers[layer], chunk)

    def capture(self, captured: Callable[[], AbstractContextManager[torch.cuda.CUDAGraph]]) -> None:
        """Capture the kernels of each type of weights and each chunk as a graph. captured: a context that does it."""
        for weights in self._of_each_kind():
            graphs = self._graphs[weights.matrix_formats] = []
            for chunk in range(self.chunks):
                with captured() as graph:
                    self._run(weights, chunk)
                graphs.append(graph)

    def _of_each_kind(self) -> list[ExpertWeights]:
        """A layer of each combination of formats of gate, up and down."""
        return list({weights.matrix_formats: weights for weights in self._layers}.values())

    def _run(self, weights: ExpertWeights, chunk: int) -> None:
        width = self._y.shape[1]
        experts_of_one(
            *(self._inputs[None, :width], self._jobs[chunk], self._inputs[width:], self._rows, weights),
            expert_ids=None,
            into=self._y,
            add=True,
            biases=self._biases,
        )

"""A decode step's graphs where each ends at a layer with missing experts, and the stream waits between two of them.

Knows the order in which they are queued; what they hold, `graph_capture` says. For steps whose parts are timed, for
tools that run one kernel after the other, and for a GPU whose driver ends kernels that wait for long.
"""

from __future__ import annotations

from functools import partial

import torch

from fiddler.gpu.capture import captured
from fiddler.gpu.graph_capture import CapturedGraphs
from fiddler.gpu.resident_experts import run_residents
from fiddler.kernels.one_token import Signal

__all__ = ["StreamWaitGraphs"]


class StreamWaitGraphs(CapturedGraphs):
    """Implements `Graphs`. The residents and the streamed experts of a layer are graphs of their own."""

    @staticmethod
    def _sizes(layers: int) -> list[int]:
        return [1] * layers

    def queue(self, piece: int) -> None:
        """Implements `Graphs.queue`."""
        number, layer = self.number(piece), self.breaks[piece]
        with self._recorder.queued("experts"):
            self._residents[layer].replay()
        self._streaming.queue(layer, number)
        self._numbers.wait(Signal.SUMMED, number)
        super().queue(piece)
        if piece < len(self.pieces) - 1:
            self._arrive(number + 1)

    def _arrive(self, number: int) -> None:
        self._numbers.write(Signal.ARRIVED, number)

    def _capture_graphs(self, pool: torch.cuda._POOL_HANDLE) -> None:
        expert_pool = torch.cuda.graph_pool_handle()
        if self._streamed is not None:  # in a pool of their own: they run while the others' results are in use
            self._streamed.capture(partial(captured, expert_pool))
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        begin, state = 0, self._y
        for end in [*self.breaks, None]:
            with captured(pool) as graph:
                state = self._run(begin, end, state)
            self._graphs.append(graph)
            if end is not None:
                with captured(expert_pool) as self._residents[end]:
                    run_residents(self._orchestrator, end, self._router_outputs[-1], self._y, add=False)
                begin = end + 1

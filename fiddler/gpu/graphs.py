"""What a decode step needs of its graphs. Knows no GPU: tests have a thread in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from fiddler.offload.one_token import TokenPlan

__all__ = ["Graphs", "piece_sizes"]

_SINGLE, _LAYERS = 2, 4  # graphs after one layer with missing experts, then after so many: a launch takes 25 us a layer


def piece_sizes(layers: int) -> list[int]:
    """`Graphs.pieces` of so many layers with missing experts: the first ones are queued while the GPU has little."""
    single = min(_SINGLE, layers)
    return [1] * single + [min(_LAYERS, layers - begin) for begin in range(single, layers, _LAYERS)]


class Graphs(Protocol):
    """The graphs of a decode step: see `graph_capture.CapturedGraphs`."""

    @property
    def breaks(self) -> Sequence[int]:
        """The layers some of whose experts are missing. The first graph ends with the first of them."""
        ...

    @property
    def hidden(self) -> Tensor:
        """The step's hidden state [1, D], on the GPU."""
        ...

    # these four stay where they are, and are bound by `Orchestrator.bind_token`
    x: np.ndarray  # float32 [1, D], of a layer whose dense half has ended
    expert_ids: np.ndarray  # float32 [1, K]
    routing_weights: np.ndarray  # float32 [1, K]
    cpu_sum: np.ndarray  # float32 [1, D], the CPU's sum of a layer, which the next layer reads

    def begin(self, *, ahead: bool) -> None:
        """Begin a step with breaks: from now on another thread may send its copies. ahead: `begin_ahead` queued it.

        Where it queued another step than this one, the numbers of that step are left out.
        """
        ...

    def launch(self, token: int, position: int, table: np.ndarray) -> None:
        """Queue the first graph. table: int64, the sequence's blocks, as `offsets` of their pool."""
        ...

    def begin_ahead(self, position: int, table: np.ndarray) -> None:
        """Queue the first graph for the token that the last step's largest logit will choose, at the next `position`.

        On the worker thread where there are breaks.
        """
        ...

    def number(self, index: int) -> int:
        """The number of the layer `breaks[index]` in this step, for the signals."""
        ...

    @property
    def pieces(self) -> Sequence[int]:
        """Of each graph but the first, how many layers with missing experts it waits for."""
        ...

    def queue(self, piece: int) -> None:
        """Queue a graph but the first, from 0 on, with waits for copies and sums.

        On the worker thread, in order; the first graph is queued by `launch`.
        """
        ...

    def reserve(self) -> None:
        """See to the memory of the next step's logits. On the worker thread, once all copies are queued."""
        ...

    def send(self, layer: int, number: int, plan: TokenPlan) -> None:
        """Queue the copies of the layer that was divided last. On the caller's thread, see `OneToken.compute`."""
        ...

    def send_when_divided(self, index: int) -> bool:
        """Queue the copies of the layer `breaks[index]` once it is divided, unless they are queued.

        On the worker thread. False where it was not divided for half a millisecond.
        """
        ...

    def streamed(self, index: int) -> bool:
        """Whether the streamed experts of the layer `breaks[index]` are computed already."""
        ...

    def stop(self) -> None:
        """Let each wait in compiled code end: the step fails."""
        ...

    def end(self) -> None:
        """Say that every layer of this step has its sum."""
        ...

    def check(self) -> None:
        """Raise the error of the GPU's that would make `compute_token` wait forever, if there is one."""
        ...

    def logits(self, ahead: int = 0) -> Tensor:
        """Logits [1, V], on the CPU, of the step that was begun last, or `ahead` 1 before it. Waits for them."""
        ...

    def next_token(self, position: int) -> int:
        """The token of the largest logit after `position`, after which `begin_ahead` was called; waits for it.

        That step begins with this token. -1 where not all logits are finite. Call it after `logits`.
        """
        ...

    def chosen_at(self, position: int) -> Tensor:
        """The experts that the routers chose at a position, one of the last two: int64 [L, K], on the CPU.

        Those of layers with routed experts. Call it after `logits`.
        """
        ...

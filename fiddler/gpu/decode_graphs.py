"""A decode step of one token on the GPU: replays captured graphs, and computes missing experts on both sides.

Knows which thread does what; not what the graphs hold, nor sampling. The worker thread queues the step's graphs ahead
of the GPU, which waits within them for a layer's streamed experts, and for the CPU's sum. Between two graphs it waits
itself, awake, in compiled code, until a layer is divided, and queues the copies of the GPU's part. The caller's thread
waits for the experts that the router chose, divides the layer, and computes the CPU's part, in one compiled call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from fiddler.gpu.graphs import Graphs
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.worker_thread import Task
from fiddler.telemetry.recorder import Recorder

__all__ = ["DecodeGraphs"]

_LEFT = 1  # layers of the graphs that are queued whose copies may not be, when the next graph is queued
_PAUSE = 8  # steps that are not begun ahead after one that was begun for nothing, as where the likely token is banned


class _Ahead:
    """A step that was begun before its token was known. token: that of the largest logit, once that is known."""

    def __init__(self, position: int, table: np.ndarray) -> None:
        self.token: int | None = None
        self.position, self.table, self._blocks = position, table, table.tobytes()

    def is_step(self, token: int, position: int, table: np.ndarray) -> bool:
        """Whether it was begun for this token of this sequence."""
        blocks = table[: len(self.table)].tobytes()
        return (token, position) == (self.token, self.position) and blocks == self._blocks


class DecodeGraphs:
    """Decodes one sequence at a time, whichever it is, whose blocks are in the pool that its graphs captured.

    Where its caller takes the token of the largest logit, the GPU chooses it as well, and begins the next step while
    the caller still reads this one's logits. A step that was begun for nothing, as after the last token, leaves keys
    and values behind the sequence's end, which whoever has that block next overwrites before it reads them.
    """

    def __init__(self, graphs: Graphs, orchestrator: Orchestrator | None, recorder: Recorder) -> None:
        """orchestrator: None for a model without experts, whose graphs have no breaks."""
        self._graphs, self._experts, self._recorder = graphs, orchestrator, recorder
        self.uses_cpu = bool(graphs.breaks)
        """Whether some experts are not resident on the GPU."""
        self.largest: np.ndarray | None = None
        """After `logits`, see `StepOutput.largest`; None where the GPU was not asked for it."""
        self._ahead: _Ahead | None = None
        self._position = 0  # of the last step
        self._pause = 0  # steps until the next one may be begun ahead

    @property
    def hidden(self) -> Tensor:
        """The hidden state [1, D] of the last step, until the next one."""
        return self._graphs.hidden

    def step(self, token: int, position: int, table: np.ndarray, *, greedy: bool = False) -> None:
        """Append `token` at `position`. Until the next step, `hidden` and `logits` are those of this token.

        table: int64, the sequence's blocks up to that position, as `offsets` of their pool.
        greedy: the next step will probably append the token of the largest logit; the table has room for it, and
        `hidden` is not needed.
        An interrupted step must have ended before this one: see `Orchestrator.start_over`.
        """
        ahead, self._ahead, self.largest = self._ahead, None, None
        taken = ahead is not None and ahead.is_step(token, position, table)
        if not taken:
            self._pause = self._pause - 1 if ahead is None else _PAUSE
        begins_next = greedy and self._pause <= 0
        following = _Ahead(position + 1, table) if begins_next else None
        launch = None if taken else partial(self._graphs.launch, token, position, table)
        try:
            if self.uses_cpu:
                self._compute_missing(launch, following)
            else:
                if launch is not None:
                    launch()
                if following is not None:
                    self._graphs.begin_ahead(following.position, table)
            self._ahead, self._position = following, position
        except BaseException:
            if self._experts is not None:
                self._experts.start_over()
            raise

    def forget_ahead(self) -> None:
        """Let the next step not be one that was begun ahead: others may have written to that one's blocks since then.

        The logits of the last step must have been read.
        """
        self._ahead = None

    def logits(self) -> Tensor:
        """Logits of the last step: [1, V], on the CPU. Waits for them, and tells which experts were chosen."""
        ahead = self._ahead
        logits = self._graphs.logits(0 if ahead is None or self.uses_cpu else 1)  # with breaks, `ahead` has none yet
        if self._recorder.wants_expert_ids:
            for layer, expert_ids in enumerate(self._graphs.chosen_at(self._position)):
                self._recorder.chosen(layer, expert_ids[None])
        if ahead is not None:
            ahead.token = self._graphs.next_token(self._position)
            self.largest = np.array([ahead.token])
        return logits

    def without_logits(self) -> None:
        """End a step whose logits nobody reads: tell which experts were chosen, if that is asked for."""
        if self._recorder.wants_expert_ids:
            self.logits()

    @property
    def _orchestrator(self) -> Orchestrator:
        assert self._experts is not None, "a model without experts has no missing ones"
        return self._experts

    def _compute_missing(self, launch: Callable[[], None] | None, ahead: _Ahead | None) -> None:
        """Divide each layer with missing experts, and compute the CPU's part. ahead: see `_queue_all`.

        launch: queues the first graph; None where the last step did. The worker thread wakes up meanwhile, if it may.
        """
        self._graphs.begin(ahead=launch is None)
        begin = partial(self._orchestrator.cooperative_step.begin, partial(self._queue_all, ahead))
        queueing = begin() if self._sends_first else None
        if launch is not None:
            launch()
        queueing = queueing or begin()
        for index in range(len(self._graphs.breaks)):
            self._compute(index, queueing)
        queueing.wait()
        self._graphs.end()

    @property
    def _sends_first(self) -> bool:
        """Whether the worker thread sends the first layer's copies before it queues a graph.

        They are one chunk: others would wait for the products of a graph. In a trace the caller sends.
        """
        chunks = self._orchestrator.ring.token_chunks(self._graphs.expert_ids.shape[1])
        return chunks == 1 and not self._recorder.wants_queued

    def _compute(self, index: int, queueing: Task) -> None:
        """Divide the layer `breaks[index]` as soon as its inputs are there, and compute the CPU's part.

        Raises the error of `queueing`, if any.
        """
        graphs, orchestrator = self._graphs, self._orchestrator
        layer, number = graphs.breaks[index], graphs.number(index)
        while (plan := orchestrator.compute_token(layer, number, graphs.send)) is None:
            graphs.check()
            if queueing.ended:
                queueing.wait()
        if plan.parts:
            now = time.perf_counter()
            self._recorder.did("copy", now, now, plan.gpu_rows * orchestrator.layers[layer].hidden_row_bytes)
        if plan.cpu_rows and plan.parts:
            orchestrator.balances[layer].tell(plan.missing, gpu_first=graphs.streamed(index), lead=plan.lead)
        elif plan.missing:
            orchestrator.balances[layer].tell_alone(plan.missing)

    def _queue_all(self, ahead: _Ahead | None) -> None:
        """On the worker thread: queue all graphs but the first, and send each layer's copies once it is divided.

        Those of the first layer may go before all graphs, see `_sends_first`.
        ahead: then begin this next step, unless the step is broken off.
        """
        graphs, step, queued, sent = self._graphs, self._orchestrator.cooperative_step, 0, 0
        try:
            if self._sends_first:
                self._send_when_divided(0)
                sent = 1
            for piece, layers in enumerate(graphs.pieces):
                while sent < queued - _LEFT:
                    self._send_when_divided(sent)
                    sent += 1
                if step.stopping:
                    return
                graphs.queue(piece)
                queued += layers
            for index in range(sent, queued):
                self._send_when_divided(index)
            if step.stopping:
                return
            if ahead is not None:
                graphs.begin_ahead(ahead.position, ahead.table)
            graphs.reserve()
        except BaseException:
            graphs.stop()  # the caller may wait in compiled code
            raise

    def _send_when_divided(self, index: int) -> None:
        """Queue the copies of the layer `breaks[index]` once it is divided, unless the step is broken off."""
        while not self._graphs.send_when_divided(index):
            if self._orchestrator.cooperative_step.stopping:
                return
            self._graphs.check()

"""A decode step of one token on the GPU: replays captured graphs, and computes missing experts on both sides.

Knows which thread does what; not what the graphs hold, nor sampling. The caller's thread reads which experts the router
chose, plans once, queues the first copies of the GPU's part, hands the rest to the worker thread in a `LayerPlan`, and
computes the CPU's part. Meanwhile the worker thread queues what reads the copies, a semaphore wait for the CPU's sum,
and the next graph. So the time between two layers' experts is almost all the GPU's. The copies are the caller's: on the
worker thread, which must wake up and wait for Python's lock first, they began 0.2 ms later.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from fiddler.offload.one_token import TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.telemetry.recorder import Recorder

__all__ = ["DecodeGraphs", "Graphs", "LayerPlan"]

_POLL_SECONDS = 1e-3
_PAUSE = 8  # steps that are not begun ahead after one that was begun for nothing, as where the likely token is banned


class Graphs(Protocol):
    """A decode step's graphs: see `graph_capture.CapturedGraphs`."""

    @property
    def breaks(self) -> Sequence[int]:
        """The layers after which a graph ends, except the last graph: some of their experts are missing."""
        ...

    @property
    def hidden(self) -> Tensor:
        """The step's hidden state [1, D], on the GPU."""
        ...

    @property
    def chosen(self) -> Sequence[Tensor]:
        """The experts that the step's routers chose, of each layer int64 [1, K], on the GPU."""
        ...

    # these four stay where they are, and are bound by `Orchestrator.bind_token`
    x: np.ndarray  # float32 [1, D], of a layer whose graph has ended
    expert_ids: np.ndarray  # float32 [1, K]
    routing_weights: np.ndarray  # float32 [1, K]
    cpu_sum: np.ndarray  # float32 [1, D], the CPU's sum of a layer, which the next graph reads

    def begin(self, token: int, position: int, table: np.ndarray) -> None:
        """Queue the first graph. table: int64, the sequence's blocks, as `offsets` of their pool."""
        ...

    def begin_ahead(self, table: np.ndarray) -> None:
        """Queue the first graph for the token that the last step's largest logit will choose, at the next position."""
        ...

    def queue(self, graph: int) -> None:
        """Queue a graph and the resident experts of the layer that ends it."""
        ...

    def wait(self, graph: int) -> None:
        """Wait until a graph's outputs are on the host."""
        ...

    def send(self, layer: int, plan: TokenPlan) -> None:
        """Queue the copies of the layer that was divided last, as many as the ring holds. On the caller's thread."""
        ...

    def stream(self) -> None:
        """Queue the streamed experts that were sent last, and the copies that are left. On the worker thread."""
        ...

    def streamed(self, layer: int) -> bool:
        """Whether the streamed experts of this layer are computed already."""
        ...

    def logits(self, ahead: int = 0) -> Tensor:
        """Logits [1, V], on the CPU, of the step that was begun last, or `ahead` 1 before it. Waits for them."""
        ...

    def next_token(self, position: int) -> int:
        """The token of the largest logit after `position`, one of the last two: the one that `begin_ahead` takes.

        Call it after `logits`.
        """
        ...


class LayerPlan(NamedTuple):
    """The GPU's part of a layer with missing experts, on its way from the caller's thread to the worker thread."""

    streams: bool  # the GPU has a part, whose copies are sent
    number: int  # of the semaphore wait for the CPU's sum


class _Ahead:
    """A step that was begun before its token was known. token: that of the largest logit, once that is read."""

    def __init__(self, position: int, table: np.ndarray) -> None:
        self.token: int | None = None
        self.position, self._table = position, table

    def is_step(self, token: int, position: int, table: np.ndarray) -> bool:
        """Whether it was begun for this token of this sequence."""
        blocks = self._table
        return (token, position) == (self.token, self.position) and np.array_equal(table[: len(blocks)], blocks)


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
        self._ahead: _Ahead | None = None
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
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.is_step(token, position, table):
            self._graphs.begin(token, position, table)
            self._pause = self._pause - 1 if ahead is None else _PAUSE
        if greedy and self._pause <= 0 and not self.uses_cpu and not self._recorder.wants_expert_ids:
            self._graphs.begin_ahead(table)
            self._ahead = _Ahead(position + 1, table)
        try:
            if self.uses_cpu:
                self._compute_missing()
            if self._recorder.wants_expert_ids:
                for layer, expert_ids in enumerate(self._graphs.chosen):
                    self._recorder.chosen(layer, expert_ids)
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
        """Logits of the last step: [1, V], on the CPU. Waits for them."""
        if self._ahead is None:
            return self._graphs.logits()
        logits = self._graphs.logits(1)
        self._ahead.token = self._graphs.next_token(self._ahead.position - 1)
        return logits

    @property
    def _orchestrator(self) -> Orchestrator:
        assert self._experts is not None, "a model without experts has no missing ones"
        return self._experts

    def _compute_missing(self) -> None:
        """Plan each layer with missing experts, and compute the CPU's part while the worker thread queues the GPU's."""
        plans, queued = SimpleQueue[LayerPlan](), SimpleQueue[bool]()
        queueing = self._orchestrator.cooperative_step.begin(partial(self._queue_all, plans, queued))
        for graph, layer in enumerate(self._graphs.breaks):
            self._compute(graph, layer, plans)
            if not queued.get():  # the worker thread has ended early
                break
        queueing.wait()

    def _compute(self, graph: int, layer: int, plans: SimpleQueue[LayerPlan]) -> None:
        """Plan the layer that ends this graph, hand the plan over, and compute the CPU's part."""
        graphs, orchestrator, cooperative_step = self._graphs, self._orchestrator, self._orchestrator.cooperative_step
        with self._recorder.span("wait", 0):
            graphs.wait(graph)
        plan, part = orchestrator.split_token(layer)
        number = cooperative_step.number()
        if plan.parts:
            graphs.send(layer, plan)
        plans.put(LayerPlan(plan.parts > 0, number))
        if not orchestrator.on_cpu(part, graphs.cpu_sum):
            graphs.cpu_sum[:] = 0
        cooperative_step.open(number)  # before anything that can wait: the GPU may
        if plan.cpu_rows and plan.parts:
            orchestrator.balance.tell(gpu_first=graphs.streamed(layer), lead=plan.lead)
        elif plan.missing:
            orchestrator.balance.tell_alone()

    def _queue_all(self, plans: SimpleQueue[LayerPlan], queued: SimpleQueue[bool]) -> None:
        """On the worker thread: queue the GPU's part of each layer, a wait for the CPU's sum, and the next graph.

        queued: receives True with each graph, and False at the end. This thread waits for a graph as the caller's
        does, awake: woken from a sleep on a core that has gone to sleep, too, it is late. While the CPU computes, it
        sleeps.
        """
        graphs, cooperative_step = self._graphs, self._orchestrator.cooperative_step
        try:
            for graph in range(len(graphs.breaks)):
                graphs.wait(graph)
                plan = self._next_plan(plans)
                if plan is None:
                    return
                if plan.streams:
                    graphs.stream()
                self._orchestrator.semaphore.wait(plan.number)
                graphs.queue(graph + 1)
                queued.put(True)
                cooperative_step.rest(plan.number)
        finally:
            queued.put(False)

    def _next_plan(self, plans: SimpleQueue[LayerPlan]) -> LayerPlan | None:
        """The caller's plan, which comes within microseconds; None where the step was broken off."""
        while not self._orchestrator.cooperative_step.stopping:
            try:
                return plans.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
        return None

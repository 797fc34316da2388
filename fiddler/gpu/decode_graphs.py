"""A step of one token on the GPU, as captured CUDA graphs: replayed, they cost Python and the driver next to nothing.

Knows the model's blocks and who has which experts; not sampling or text. Layers whose experts are all residents run
one after the other in one graph. After any other layer the graph ends: the CPU must see which experts were chosen.
While it computes its part of them, the side thread queues the GPU's and, behind a wait for the CPU's, the next graph.
So what lies between one layer's experts and the next one's is the GPU's time, and little of ours.
"""

from __future__ import annotations

from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.gpu import decode_kernels
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.gpu.graph_capture import OneToken, captured
from fiddler.models.mixtral import Mixtral
from fiddler.offload.feed_forward import torch_type
from fiddler.offload.orchestrator import Orchestrator, Split
from fiddler.runtime.kv_cache import KVCache
from fiddler.telemetry.recorder import Recorder

__all__ = ["DecodeGraphs"]


class DecodeGraphs:
    """Decodes a sequence whose keys and values stay where they were when its graphs were captured."""

    def __init__(
        self, model: Mixtral, orchestrator: Orchestrator, sequence: KVCache, cos_sin: Tensor, recorder: Recorder
    ) -> None:
        """turns: of every position, see `rotate_and_store`.

        sequence: with room for its whole context; any later one that uses the same storage will do.
        """
        config, device = model.config, sequence.device
        self._model, self._orchestrator, self._recorder = model, orchestrator, recorder
        self._k = config.expert_used_count
        width = config.embedding_length
        self._given = torch.zeros(2, dtype=torch.int64, pin_memory=True).numpy()  # the token and its position
        self._place = torch.zeros(2, dtype=torch.int64, device=device)
        self._cache = OneToken(sequence, self._place[1:], cos_sin, config.sliding_window)
        self._seen = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._handed = torch.zeros(width + self._k, device=device)  # of it what streamed experts need: x, weights
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._made = torch.zeros(1, width, pin_memory=True)  # the CPU's
        self._jobs = torch.zeros(self._k, 5, dtype=torch.int64, device=device)
        self._listed = torch.zeros(self._k, 5, dtype=torch.int64, pin_memory=True)
        seen = self._seen.numpy()
        self._x, self._ids, self._routing_weights = np.split(seen[None], [width, width + self._k], axis=1)
        self._sum = self._made.numpy()
        self._taken, self._streamed_all, self._ended = (torch.cuda.Event() for _ in range(3))
        self._streamed_for = -1  # the layer after which `_streamed_all` was set
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # the layers after which they end, but for the last
        self._breaks = [layer for layer in range(len(orchestrator.layers)) if not orchestrator.complete(layer)]
        self._arrived = [torch.cuda.Event() for _ in self._breaks]
        self._streamed: dict[torch.dtype, torch.cuda.CUDAGraph] = {}
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        self._router_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # what one graph makes for another
        self._logits = torch.zeros(1, config.vocab_size, pin_memory=True)
        self.hidden = torch.empty(0)
        self._capture()

    @property
    def uses_cpu(self) -> bool:
        """Whether some experts are not on the GPU."""
        return bool(self._breaks)

    def step(self, token: int, position: int) -> None:
        """Append `token`; then `hidden` [1, D] is its, and what `logits` returns, until the next step.

        What a step before left, if it was broken off, is at an end; see `Orchestrator.start_over`.
        """
        orchestrator = self._orchestrator
        self._taken.synchronize()
        self._given[:] = token, position
        stream = torch.cuda.current_stream()
        cuda_driver.copy_to_device(self._place.data_ptr(), self._given.ctypes.data, 16, stream.cuda_stream)
        self._taken.record(stream)
        self._queue(0, stream)
        if not self.uses_cpu:
            return
        told, self._streamed_for = SimpleQueue[int | None](), -1
        try:
            queueing = orchestrator.shared.begin(partial(self._queue_all, told))
            for graph, layer in enumerate(self._breaks):
                if not self._compute(graph, layer, told):
                    break
            queueing.wait()
        except BaseException:
            orchestrator.start_over()
            raise

    def logits(self) -> Tensor:
        """Of the last step: [1, V], on the CPU. Waits for them."""
        self._ended.synchronize()
        return self._logits.clone()

    def _queue(self, graph: int, stream: torch.cuda.Stream) -> None:
        """Queue a graph, and the residents of the layer after it, in `stream`, which is the current one."""
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()
        if graph == len(self._breaks):
            self._ended.record(stream)
            return
        self._arrived[graph].record(stream)
        with self._recorder.queued("experts"):
            self._residents[self._breaks[graph]].replay()

    def _chosen(self, layer: int) -> tuple[list[int], Split]:
        """Which experts the GPU chose, and who does what. Both threads find it, the one waiting for the other longer.

        It is the same for both: the balance, on which a plan depends, changes only between the side thread's number,
        which comes after its plan, and the opening of the gate, before which there is no next plan.
        """
        chosen = [int(e) for e in self._ids[0].tolist()]
        return chosen, self._orchestrator.split_one(layer, chosen)

    def _queue_all(self, told: SimpleQueue[int | None]) -> None:
        """On the side thread: queue the GPU's part of each layer with missing experts, and the graph after it.

        Tells the number of the wait between the two, then that the graph is queued (0); None when it is over.
        """
        orchestrator, shared, stream = self._orchestrator, self._orchestrator.shared, torch.cuda.current_stream()
        try:
            for graph, layer in enumerate(self._breaks):
                self._arrived[graph].synchronize()
                chosen, split = self._chosen(layer)
                number = shared.number()
                if shared.stopping:
                    return
                told.put(number)
                if any(split.gpu_rows.values()):
                    self._stream(layer, chosen, split)
                    self._streamed_all.record(stream)
                    self._streamed_for = layer
                orchestrator.semaphore.wait(number)
                self._queue(graph + 1, stream)
                told.put(0)
                shared.rest()  # to wait for the GPU keeps a core busy, and the CPU's kernels need it
        finally:
            told.put(None)

    def _compute(self, graph: int, layer: int, told: SimpleQueue[int | None]) -> bool:
        """The CPU's experts of the layer after this graph; False where the side thread came to an end instead."""
        orchestrator = self._orchestrator
        with self._recorder.span("wait", 0):
            self._arrived[graph].synchronize()
        chosen, split = self._chosen(layer)
        expert_ids = np.array(chosen, np.int64)[None]
        computed = orchestrator.on_cpu(layer, self._x, expert_ids, self._routing_weights, split, self._sum)
        gpu_first = self._streamed_for == layer and self._streamed_all.query()
        if not computed:
            self._sum[:] = 0
        number = told.get()
        if number is not None and computed and any(split.gpu_rows.values()):
            orchestrator.balance.tell(gpu_first=gpu_first)
        orchestrator.shared.open(number)
        return number is not None and told.get() is not None

    def _stream(self, layer: int, chosen: list[int], split: Split) -> None:
        """Queue copies of the GPU's rows, and their products as soon as they are there."""
        ring, weights = self._orchestrator.ring, self._orchestrator.layers[layer]
        stream = torch.cuda.current_stream().cuda_stream
        hidden, room = weights.gate.shape[1], ring.rows * ring.slots
        wanted = [
            (e, begin, min(begin + room, hidden))
            for e, rows in split.gpu_rows.items()
            for begin in range(hidden - rows, hidden, room)
        ]
        nbytes = sum(split.gpu_rows.values()) * 6 * weights.gate.shape[2]
        with self._recorder.span("link", nbytes):
            while wanted:
                taken, rows = 0, 0
                while taken < len(wanted) and rows + wanted[taken][2] - wanted[taken][1] <= room:
                    rows += wanted[taken][2] - wanted[taken][1]
                    taken += 1
                parts = ring.send_together(layer, wanted[:taken])
                listed = self._listed.numpy()
                listed[:] = 0
                for row, part in zip(listed, parts, strict=False):
                    row[:] = (*part.addresses, part.end - part.begin, chosen.index(part.expert))
                cuda_driver.copy_to_device(self._jobs.data_ptr(), self._listed.data_ptr(), self._listed.nbytes, stream)
                parts[0].arrived.wait()
                with self._recorder.queued("experts"):
                    self._streamed[torch_type(weights)].replay()
                ring.done_together()
                wanted = wanted[taken:]
                if wanted:  # the list of jobs is read by what was queued before
                    torch.cuda.current_stream().synchronize()

    def _capture(self) -> None:
        """Record the graphs, after a run that compiles and loads what they need."""
        layers = self._orchestrator.layers
        aside = torch.cuda.Stream(self._y.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            kinds = {torch_type(weights) for weights in layers}
            self._run(0, None, self._y)
            for layer in self._breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            for kind in kinds:
                self._run_streamed(kind)
            self._router_outputs.clear()
            pool, aside_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            for kind in kinds:  # with memory of their own: they run while the other graphs' results are in use
                with captured(aside_pool) as self._streamed[kind]:
                    self._run_streamed(kind)
            begin, state = 0, self._y
            for end in [*self._breaks, None]:
                with captured(pool) as graph:
                    state = self._run(begin, end, state)
                self._graphs.append(graph)
                if end is not None:
                    with captured(aside_pool) as self._residents[end]:
                        self._run_residents(end, *self._router_outputs[-1], self._y, add=False)
                begin = len(layers) if end is None else end + 1
        torch.cuda.synchronize()

    def _run(self, begin: int, end: int | None, h: Tensor) -> Tensor:
        """The model from the experts of layer `begin` - 1 to those of layer `end`, or to the logits."""
        if begin == 0:
            h = self._model.token_embd[self._place[:1]].float()
        else:
            h = decode_kernels.gather(h, self._y, self._made)
        last = len(self._model.blk) - 1 if end is None else end
        for layer in range(begin, last + 1):
            h, x, expert_ids, routing_weights = self._model.blk[layer].before_experts(h, self._cache)
            if layer == end:
                decode_kernels.hand_over(x, expert_ids, routing_weights, self._handed, self._seen)
                self._router_outputs.append((x, expert_ids, routing_weights))
            else:
                self._run_residents(layer, x, expert_ids, routing_weights, h, add=True)
        if end is None:
            self.hidden = h
            self._logits.copy_(self._model.logits(h), non_blocking=True)
        return h

    def _run_residents(
        self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor, into: Tensor, *, add: bool
    ) -> None:
        weights = self._orchestrator.layers[layer]
        experts_of_one(
            x,
            self._orchestrator.residents.table[layer],
            routing_weights,
            weights.gate.shape[1],
            torch_type(weights),
            expert_ids=expert_ids,
            into=into,
            add=add,
            rounded=weights.variant.activations == "bf16",
            even=weights.gate.shape[1] % 16 == 0,
        )

    def _run_streamed(self, kind: torch.dtype) -> None:
        width = self._y.shape[1]
        weights = next(weights for weights in self._orchestrator.layers if torch_type(weights) == kind)
        experts_of_one(
            self._handed[None, :width],
            self._jobs,
            self._handed[width:],
            self._orchestrator.ring.rows * self._orchestrator.ring.slots,
            kind,
            expert_ids=None,
            into=self._y,
            add=True,
            rounded=weights.variant.activations == "bf16",
            even=weights.gate.shape[1] % 16 == 0,
        )

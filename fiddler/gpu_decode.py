"""A step of one token on the GPU, as captured CUDA graphs: replayed, they cost Python and the driver next to nothing.

Knows the model's blocks and who has which experts; not sampling or text. Layers whose experts are all residents run
one after the other in one graph. After any other layer the graph ends: the CPU must see which experts were chosen.
While it computes its part of them, the side thread queues the GPU's and, behind a wait for the CPU's, the next graph.
So what lies between one layer's experts and the next one's is the GPU's time, and little of ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fiddler import cuda_driver, gpu_attention, gpu_kernels
from fiddler.cache import Sequence
from fiddler.gpu_experts import torch_type
from fiddler.models.mixtral import Mixtral
from fiddler.orchestrator import Orchestrator, Split
from fiddler.recorder import Recorder

__all__ = ["Decoder"]


class _OneToken:
    """The model's `Cache` for one token of one sequence, whose position is read on the device."""

    def __init__(self, sequence: Sequence, position: Tensor, turns: Tensor, window: int | None) -> None:
        self._keys, self._values = sequence.storage
        self._position, self._turns, self._window = position, turns, window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        q = gpu_attention.rotate_and_store(q, k, v, self._turns, self._position, keys, values)
        return gpu_attention.attend_one(q, keys, values, self._position, self._window)


class Decoder:
    """Decodes a sequence whose keys and values stay where they were when its graphs were captured."""

    def __init__(
        self, model: Mixtral, orchestrator: Orchestrator, sequence: Sequence, turns: Tensor, recorder: Recorder
    ) -> None:
        """turns: of every position, see `rotate_and_store`.

        sequence: with room for its whole context; any later one that uses the same storage will do.
        """
        config, device = model.config, sequence.device
        self._model, self._orchestrator, self._recorder = model, orchestrator, recorder
        self._k = config.expert_used_count
        width = config.embedding_length
        self._given = torch.zeros(2, dtype=torch.int64, pin_memory=True)  # the token and its position
        self._place = torch.zeros(2, dtype=torch.int64, device=device)
        self._cache = _OneToken(sequence, self._place[1:], turns, config.sliding_window)
        self._seen = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._handed = torch.zeros(width + self._k, device=device)  # of it what streamed experts need: x, weights
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._made = torch.zeros(1, width, pin_memory=True)  # the CPU's
        self._jobs = torch.zeros(self._k, 5, dtype=torch.int64, device=device)
        self._listed = torch.zeros(self._k, 5, dtype=torch.int64, pin_memory=True)
        self._arrived, self._taken, self._streamed_all = (torch.cuda.Event() for _ in range(3))
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._breaks: list[int] = []  # the layers after which they end, but for the last
        self._streamed: dict[torch.dtype, torch.cuda.CUDAGraph] = {}
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # what one graph makes for another
        self.hidden = self.logits = torch.empty(0)
        self._capture()

    def step(self, token: int, position: int) -> None:
        """Append `token`; then `hidden` [1, D] and `logits` [1, V] are its, until the next step."""
        self._orchestrator.start_over()
        self._taken.synchronize()
        self._given[0], self._given[1] = token, position
        stream = torch.cuda.current_stream().cuda_stream
        cuda_driver.copy_to_device(self._place.data_ptr(), self._given.data_ptr(), 16, stream)
        self._taken.record()
        self._queue(0)
        for graph, layer in enumerate(self._breaks):
            self._missing(graph, layer)

    def _queue(self, graph: int) -> None:
        """Queue a graph, and the residents of the layer after it."""
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()
        if graph < len(self._breaks):
            self._arrived.record()
            with self._recorder.queued("experts"):
                self._residents[self._breaks[graph]].replay()

    def _missing(self, graph: int, layer: int) -> None:
        """The experts of a layer that are not residents, after this graph, and the next one."""
        orchestrator, width = self._orchestrator, self._y.shape[1]
        with self._recorder.span("wait", 0):
            self._arrived.synchronize()
        seen = self._seen.numpy()
        x, ids, weights = seen[:width], seen[width : width + self._k].astype(np.int64), seen[width + self._k :]
        chosen = tuple(ids.tolist())
        split = orchestrator.split_one(layer, chosen)
        number, after = orchestrator.gate.next(), graph + 1
        streamed, queued = any(split.gpu_rows.values()), list[bool]()

        def on_gpu() -> None:
            if streamed:
                self._stream(layer, chosen, split)
                self._streamed_all.record()
                queued.append(True)
            orchestrator.gate.wait(number)
            self._queue(after)

        try:
            queueing = orchestrator.aside(on_gpu)
            computed = orchestrator.on_cpu(layer, x[None], ids[None], weights[None], split, self._made.numpy())
            if not computed:
                self._made.zero_()
            elif streamed:
                orchestrator.balance.tell(gpu_first=bool(queued) and self._streamed_all.query())
        finally:
            orchestrator.gate.open(number)
        queueing.wait()

    def _stream(self, layer: int, chosen: tuple[int, ...], split: Split) -> None:
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
            self._breaks = [layer for layer in range(len(layers)) if not self._orchestrator.complete(layer)]
            self._run(0, None, self._y)
            for layer in self._breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            for kind in kinds:
                self._run_streamed(kind)
            self._kept.clear()
            pool, aside_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            for kind in kinds:  # with memory of their own: they run while the other graphs' results are in use
                self._streamed[kind] = torch.cuda.CUDAGraph()
                self._streamed[kind].capture_begin(aside_pool, capture_error_mode="thread_local")
                self._run_streamed(kind)
                self._streamed[kind].capture_end()
            begin, state = 0, self._y
            for end in [*self._breaks, None]:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool, capture_error_mode="thread_local")
                state = self._run(begin, end, state)
                graph.capture_end()
                self._graphs.append(graph)
                if end is not None:
                    self._residents[end] = torch.cuda.CUDAGraph()
                    self._residents[end].capture_begin(aside_pool, capture_error_mode="thread_local")
                    self._run_residents(end, *self._kept[-1], self._y, add=False)
                    self._residents[end].capture_end()
                begin = len(layers) if end is None else end + 1
        torch.cuda.synchronize()

    def _run(self, begin: int, end: int | None, h: Tensor) -> Tensor:
        """The model from the experts of layer `begin` - 1 to those of layer `end`, or to the logits."""
        if begin == 0:
            h = self._model.token_embd[self._place[:1]].float()
        else:
            h = gpu_kernels.gather(h, self._y, self._made)
        last = len(self._model.blk) - 1 if end is None else end
        for layer in range(begin, last + 1):
            h, x, ids, shares = self._model.blk[layer].before_experts(h, self._cache)
            if layer == end:
                gpu_kernels.hand_over(x, ids, shares, self._handed, self._seen)
                self._kept.append((x, ids, shares))
            else:
                self._run_residents(layer, x, ids, shares, h, add=True)
        if end is None:
            self.hidden, self.logits = h, self._model.logits(h)
        return h

    def _run_residents(self, layer: int, x: Tensor, ids: Tensor, shares: Tensor, into: Tensor, *, add: bool) -> None:
        weights = self._orchestrator.layers[layer]
        gpu_kernels.experts_of_one(
            x,
            self._orchestrator.residents.table[layer],
            shares,
            weights.gate.shape[1],
            torch_type(weights),
            ids=ids,
            into=into,
            add=add,
            rounded=weights.product.activations == "bf16",
            even=weights.gate.shape[1] % 16 == 0,
        )

    def _run_streamed(self, kind: torch.dtype) -> None:
        width = self._y.shape[1]
        weights = next(weights for weights in self._orchestrator.layers if torch_type(weights) == kind)
        gpu_kernels.experts_of_one(
            self._handed[None, :width],
            self._jobs,
            self._handed[width:],
            self._orchestrator.ring.rows * self._orchestrator.ring.slots,
            kind,
            ids=None,
            into=self._y,
            add=True,
            rounded=weights.product.activations == "bf16",
            even=weights.gate.shape[1] % 16 == 0,
        )

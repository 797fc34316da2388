"""A decode step of one token on the GPU as captured CUDA graphs: replays cost Python and the driver next to nothing.

Knows the model's blocks and which experts are resident; not sampling or text. Consecutive layers whose experts are all
resident run in one graph. After any other layer the graph ends: the CPU must read which experts the router chose.
While the CPU computes its part of them, the worker thread queues the GPU's part, a semaphore wait for the CPU's sum,
and the next graph. So the time between two layers' experts is almost all the GPU's.
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
from fiddler.gpu.graph_capture import DecodeCache, captured
from fiddler.models.mixtral import Mixtral
from fiddler.offload.feed_forward import torch_type
from fiddler.offload.orchestrator import Orchestrator, Split
from fiddler.runtime.kv_cache import KVCache
from fiddler.telemetry.recorder import Recorder

__all__ = ["DecodeGraphs"]


class DecodeGraphs:
    """Decodes a sequence whose KV cache stays at the addresses that its graphs captured."""

    def __init__(
        self, model: Mixtral, orchestrator: Orchestrator, sequence: KVCache, cos_sin: Tensor, recorder: Recorder
    ) -> None:
        """cos_sin: of every position, see `rotate_and_store`.

        sequence: has room for its whole context; the graphs serve any later sequence in the same storage, too.
        """
        config, device = model.config, sequence.device
        self._model, self._orchestrator, self._recorder = model, orchestrator, recorder
        self._k = config.expert_used_count
        width = config.embedding_length
        self._given = torch.zeros(2, dtype=torch.int64, pin_memory=True).numpy()  # token id, position
        self._place = torch.zeros(2, dtype=torch.int64, device=device)
        self._cache = DecodeCache(sequence, self._place[1:], cos_sin, config.sliding_window)
        self._host_inputs = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._streamed_inputs = torch.zeros(width + self._k, device=device)  # x and weights, for streamed experts
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._cpu_sum = torch.zeros(1, width, pin_memory=True)  # the CPU's
        self._jobs = torch.zeros(self._k, 5, dtype=torch.int64, device=device)
        self._host_jobs = torch.zeros(self._k, 5, dtype=torch.int64, pin_memory=True)
        host_inputs = self._host_inputs.numpy()
        self._x, self._ids, self._routing_weights = np.split(host_inputs[None], [width, width + self._k], axis=1)
        self._sum = self._cpu_sum.numpy()
        # recorded after the copy of `_given`, after a layer's streamed experts, after the last graph
        self._taken, self._streamed_all, self._ended = (torch.cuda.Event() for _ in range(3))
        self._streamed_layer = -1  # whose streamed experts `_streamed_all` follows
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # the layers after which a graph ends, except the last graph
        self._breaks = [layer for layer in range(len(orchestrator.layers)) if not orchestrator.complete(layer)]
        self._arrived = [torch.cuda.Event() for _ in self._breaks]
        self._streamed: dict[torch.dtype, torch.cuda.CUDAGraph] = {}
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        self._router_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # of `before_experts`, one graph's for another
        self._logits = torch.zeros(1, config.vocab_size, pin_memory=True)
        self.hidden = torch.empty(0)
        self._capture()

    @property
    def uses_cpu(self) -> bool:
        """Whether some experts are not resident on the GPU."""
        return bool(self._breaks)

    def step(self, token: int, position: int) -> None:
        """Append `token` at `position`. Until the next step, `hidden` [1, D] and `logits` are those of this token.

        An interrupted step must have ended before this one: see `Orchestrator.start_over`.
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
        messages, self._streamed_layer = SimpleQueue[int | None](), -1
        try:
            queueing = orchestrator.shared.begin(partial(self._queue_all, messages))
            for graph, layer in enumerate(self._breaks):
                if not self._compute(graph, layer, messages):
                    break
            queueing.wait()
        except BaseException:
            orchestrator.start_over()
            raise

    def logits(self) -> Tensor:
        """Logits of the last step: [1, V], on the CPU. Waits for them."""
        self._ended.synchronize()
        return self._logits.clone()

    def _queue(self, graph: int, stream: torch.cuda.Stream) -> None:
        """Queue a graph and the resident experts of the layer that ends it, in `stream`, the current one."""
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()
        if graph == len(self._breaks):
            self._ended.record(stream)
            return
        self._arrived[graph].record(stream)
        with self._recorder.queued("experts"):
            self._residents[self._breaks[graph]].replay()

    def _chosen(self, layer: int) -> tuple[list[int], Split]:
        """The expert ids that the router chose, and their division between CPU and GPU. Both threads compute it.

        Waiting for the other thread would take longer. Both get the same result: a plan depends on the balance, which
        changes only between the worker thread's semaphore number, sent after its plan, and the semaphore's opening,
        before which there is no next plan.
        """
        chosen = [int(e) for e in self._ids[0].tolist()]
        return chosen, self._orchestrator.split_one(layer, chosen)

    def _queue_all(self, messages: SimpleQueue[int | None]) -> None:
        """On the worker thread: queue the GPU's part of each layer with missing experts, and the graph after it.

        Puts into `messages`, for each layer, the number of the semaphore wait between the two, and 0 once the graph is
        queued; None at the end.
        """
        orchestrator, shared, stream = self._orchestrator, self._orchestrator.shared, torch.cuda.current_stream()
        try:
            for graph, layer in enumerate(self._breaks):
                self._arrived[graph].synchronize()
                chosen, split = self._chosen(layer)
                number = shared.number()
                if shared.stopping:
                    return
                messages.put(number)
                if any(split.gpu_rows.values()):
                    self._stream(layer, chosen, split)
                    self._streamed_all.record(stream)
                    self._streamed_layer = layer
                orchestrator.semaphore.wait(number)
                self._queue(graph + 1, stream)
                messages.put(0)
                shared.rest()  # sleeps: waiting for the GPU keeps a core busy that the CPU's kernels need
        finally:
            messages.put(None)

    def _compute(self, graph: int, layer: int, messages: SimpleQueue[int | None]) -> bool:
        """Compute the CPU's part of the layer that ends this graph; False where the worker thread has ended instead."""
        orchestrator = self._orchestrator
        with self._recorder.span("wait", 0):
            self._arrived[graph].synchronize()
        chosen, split = self._chosen(layer)
        expert_ids = np.array(chosen, np.int64)[None]
        computed = orchestrator.on_cpu(layer, self._x, expert_ids, self._routing_weights, split, self._sum)
        gpu_first = self._streamed_layer == layer and self._streamed_all.query()
        if not computed:
            self._sum[:] = 0
        number = messages.get()
        if number is not None and computed and any(split.gpu_rows.values()):
            orchestrator.balance.tell(gpu_first=gpu_first)
        orchestrator.shared.open(number)
        return number is not None and messages.get() is not None

    def _stream(self, layer: int, chosen: list[int], split: Split) -> None:
        """Queue copies of the GPU's rows, and the experts' kernels after them."""
        ring, weights = self._orchestrator.ring, self._orchestrator.layers[layer]
        stream = torch.cuda.current_stream().cuda_stream
        hidden, ring_rows = weights.gate.shape[1], ring.rows * ring.slots
        pending = [
            (e, begin, min(begin + ring_rows, hidden))
            for e, rows in split.gpu_rows.items()
            for begin in range(hidden - rows, hidden, ring_rows)
        ]
        nbytes = sum(split.gpu_rows.values()) * 6 * weights.gate.shape[2]
        with self._recorder.span("link", nbytes):
            while pending:
                count, rows = 0, 0
                while count < len(pending) and rows + pending[count][2] - pending[count][1] <= ring_rows:
                    rows += pending[count][2] - pending[count][1]
                    count += 1
                parts = ring.send_together(layer, pending[:count])
                jobs = self._host_jobs.numpy()
                jobs[:] = 0
                for job, part in zip(jobs, parts, strict=False):
                    job[:] = (*part.addresses, part.end - part.begin, chosen.index(part.expert))
                cuda_driver.copy_to_device(
                    self._jobs.data_ptr(), self._host_jobs.data_ptr(), self._host_jobs.nbytes, stream
                )
                parts[0].arrived.wait()
                with self._recorder.queued("experts"):
                    self._streamed[torch_type(weights)].replay()
                ring.done_together()
                pending = pending[count:]
                if pending:  # the queued copy reads `_host_jobs`
                    torch.cuda.current_stream().synchronize()

    def _capture(self) -> None:
        """Capture the graphs, after a run that compiles and loads their kernels."""
        layers = self._orchestrator.layers
        capture_stream = torch.cuda.Stream(self._y.device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream):
            dtypes = {torch_type(weights) for weights in layers}
            self._run(0, None, self._y)
            for layer in self._breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            for dtype in dtypes:
                self._run_streamed(dtype)
            self._router_outputs.clear()
            pool, expert_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            for dtype in dtypes:  # in a pool of their own: they run while the other graphs' results are in use
                with captured(expert_pool) as self._streamed[dtype]:
                    self._run_streamed(dtype)
            begin, state = 0, self._y
            for end in [*self._breaks, None]:
                with captured(pool) as graph:
                    state = self._run(begin, end, state)
                self._graphs.append(graph)
                if end is not None:
                    with captured(expert_pool) as self._residents[end]:
                        self._run_residents(end, *self._router_outputs[-1], self._y, add=False)
                begin = len(layers) if end is None else end + 1
        torch.cuda.synchronize()

    def _run(self, begin: int, end: int | None, h: Tensor) -> Tensor:
        """The model from the experts of layer `begin` - 1 to those of layer `end`, or to the logits."""
        if begin == 0:
            h = self._model.token_embd[self._place[:1]].float()
        else:
            h = decode_kernels.gather(h, self._y, self._cpu_sum)
        last = len(self._model.blk) - 1 if end is None else end
        for layer in range(begin, last + 1):
            h, x, expert_ids, routing_weights = self._model.blk[layer].before_experts(h, self._cache)
            if layer == end:
                decode_kernels.hand_over(x, expert_ids, routing_weights, self._streamed_inputs, self._host_inputs)
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

    def _run_streamed(self, dtype: torch.dtype) -> None:
        width = self._y.shape[1]
        weights = next(weights for weights in self._orchestrator.layers if torch_type(weights) == dtype)
        experts_of_one(
            self._streamed_inputs[None, :width],
            self._jobs,
            self._streamed_inputs[width:],
            self._orchestrator.ring.rows * self._orchestrator.ring.slots,
            dtype,
            expert_ids=None,
            into=self._y,
            add=True,
            rounded=weights.variant.activations == "bf16",
            even=weights.gate.shape[1] % 16 == 0,
        )

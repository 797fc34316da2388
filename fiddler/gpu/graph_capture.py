"""Captures a decode step of one token as CUDA graphs: replays cost Python and the driver next to nothing.

Knows the model's blocks, the graphs' tensors and streams; not which thread replays what, nor how work is divided.
Consecutive layers whose experts are all resident are one graph. After any other layer a graph ends: the host must read
which experts the router chose. The next graph begins with the sum of the GPU's and the CPU's experts.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.gpu import attention_kernels, decode_kernels
from fiddler.gpu.contiguous_kv_cache import ContiguousKVCache
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.models.transformer import Transformer
from fiddler.offload.feed_forward import torch_type
from fiddler.offload.orchestrator import Orchestrator
from fiddler.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

__all__ = ["CapturedGraphs", "DecodeCache"]


class DecodeCache:
    """The model's `Cache` for one token of one sequence, whose position kernels read on the device.

    So one captured graph serves every position.
    """

    def __init__(self, sequence: ContiguousKVCache, position: Tensor, cos_sin: Tensor, window: int | None) -> None:
        self._keys, self._values = sequence.storage
        self._position, self._cos_sin, self._window = position, cos_sin, window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`."""
        assert sinks is None
        keys, values = self._keys[layer], self._values[layer]
        q = attention_kernels.rotate_and_store(q, k, v, self._cos_sin, self._position, keys, values)
        return attention_kernels.attend_one(q, keys, values, self._position, self._window)


@contextmanager
def _captured(pool: _POOL_HANDLE) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture the work queued in the current stream as a graph, with memory from `pool`.

    Python's garbage collector pauses meanwhile: it could free another engine's driver resources, such as pinned
    memory, which the driver does not allow during a capture.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:  # torch ends the process at a capture that never ended
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the graph may be empty
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collects:
            gc.enable()


class CapturedGraphs:
    """The graphs of a decode step, for a sequence whose KV cache stays at the addresses that they captured.

    `x` [1, D], `expert_ids` [1, K] and `routing_weights` [1, K], float32, are a layer's on the host after `wait`;
    `cpu_sum` [1, D] is read by the graph after it.
    """

    def __init__(
        self,
        model: Transformer,
        orchestrator: Orchestrator | None,
        sequence: ContiguousKVCache,
        cos_sin: Tensor,
        recorder: Recorder,
    ) -> None:
        """cos_sin: of every position, see `rotate_and_store`. orchestrator: None for a model without experts.

        sequence: has room for its whole context; the graphs serve any later sequence in the same storage, too.
        """
        config, device = model.config, sequence.device
        self._model, self._experts, self._recorder = model, orchestrator, recorder
        self._layers = () if orchestrator is None else orchestrator.layers  # those with experts
        self._k = config.expert_used_count
        width = config.embedding_length
        self._host_token = torch.zeros(2, dtype=torch.int64, pin_memory=True).numpy()  # token id, position
        self._token = torch.zeros(2, dtype=torch.int64, device=device)
        self._cache = DecodeCache(sequence, self._token[1:], cos_sin, config.sliding_window)
        self._host_inputs = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._streamed_inputs = torch.zeros(width + self._k, device=device)  # x and weights, for streamed experts
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._host_sum = torch.zeros(1, width, pin_memory=True)
        self._jobs = torch.zeros(self._k, 5, dtype=torch.int64, device=device)
        self._host_jobs = torch.zeros(self._k, 5, dtype=torch.int64, pin_memory=True)
        self._job_numbers = self._host_jobs.numpy().reshape(-1)
        host_inputs = self._host_inputs.numpy()[None]
        self.x, self.expert_ids, self.routing_weights = np.split(host_inputs, [width, width + self._k], axis=1)
        self.cpu_sum = self._host_sum.numpy()
        # recorded after the copy of `_host_token`, after a layer's streamed experts, after the last graph
        self._token_copied, self._streamed_all, self._ended = (torch.cuda.Event() for _ in range(3))
        self._streamed_layer = -1  # whose streamed experts `_streamed_all` follows
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.breaks = [layer for layer in range(len(self._layers)) if not self._orchestrator.complete(layer)]
        self._arrived = [torch.cuda.Event() for _ in self.breaks]
        self._streamed: dict[torch.dtype, torch.cuda.CUDAGraph] = {}
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        # of each layer int64 [1, K]; this reference stops later graphs from using their memory
        self.chosen: list[Tensor] = []
        self._router_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # of `before_experts`, one graph's for another
        self._logits = torch.zeros(1, config.vocab_size, pin_memory=True)
        self.hidden = torch.empty(0)
        self._capture()

    @property
    def _orchestrator(self) -> Orchestrator:
        assert self._experts is not None, "only layers with experts need it"
        return self._experts

    def begin(self, token: int, position: int) -> None:
        """Hand the token to the graphs, and queue the first one."""
        self._token_copied.synchronize()
        self._host_token[:] = token, position
        stream = torch.cuda.current_stream()
        cuda_driver.copy_to_device(self._token.data_ptr(), self._host_token.ctypes.data, 16, stream.cuda_stream)
        self._token_copied.record(stream)
        self._streamed_layer = -1
        self.queue(0)

    def queue(self, graph: int) -> None:
        """Queue a graph and the resident experts of the layer that ends it."""
        stream = torch.cuda.current_stream()
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()
        if graph == len(self.breaks):
            self._ended.record(stream)
            return
        self._arrived[graph].record(stream)
        with self._recorder.queued("experts"):
            self._residents[self.breaks[graph]].replay()

    def wait(self, graph: int) -> None:
        """Wait until `x`, `expert_ids` and `routing_weights` of the layer that ends this graph are on the host."""
        self._arrived[graph].synchronize()

    def logits(self) -> Tensor:
        """Logits of the step: [1, V], on the CPU. Waits for them."""
        self._ended.synchronize()
        return self._logits.clone()

    def streamed(self, layer: int) -> bool:
        """Whether the streamed experts of this layer are computed already."""
        return self._streamed_layer == layer and self._streamed_all.query()

    def stream(self, layer: int, expert_ids: Sequence[int], gpu_rows: dict[int, int]) -> None:
        """Queue copies of the last `gpu_rows` hidden rows of experts, and the experts' kernels after them."""
        ring, weights = self._orchestrator.ring, self._layers[layer]
        stream = torch.cuda.current_stream().cuda_stream
        hidden, ring_rows = weights.gate.shape[1], ring.rows * ring.slots
        pending = [
            (e, begin, min(begin + ring_rows, hidden))
            for e, rows in gpu_rows.items()
            for begin in range(hidden - rows, hidden, ring_rows)
        ]
        nbytes = sum(gpu_rows.values()) * weights.hidden_row_bytes
        with self._recorder.span("copy", nbytes):
            while pending:
                count, rows = 0, 0
                while count < len(pending) and rows + pending[count][2] - pending[count][1] <= ring_rows:
                    rows += pending[count][2] - pending[count][1]
                    count += 1
                parts = ring.send_together(layer, pending[:count])
                jobs = [
                    number
                    for part in parts
                    for number in (*part.addresses, part.end - part.begin, expert_ids.index(part.expert))
                ]
                self._job_numbers[:] = jobs + [0] * (len(self._job_numbers) - len(jobs))
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
        self._streamed_all.record(torch.cuda.current_stream())
        self._streamed_layer = layer

    def _capture(self) -> None:
        """Capture the graphs, after a run that compiles and loads their kernels."""
        layers = self._layers
        capture_stream = torch.cuda.Stream(self._y.device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream):
            dtypes = {torch_type(weights) for weights in layers}
            self._run(0, None, self._y)
            for layer in self.breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            for dtype in dtypes:
                self._run_streamed(dtype)
            self._router_outputs.clear()
            self.chosen.clear()
            pool, expert_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            for dtype in dtypes:  # in a pool of their own: they run while the other graphs' results are in use
                with _captured(expert_pool) as self._streamed[dtype]:
                    self._run_streamed(dtype)
            begin, state = 0, self._y
            for end in [*self.breaks, None]:
                with _captured(pool) as graph:
                    state = self._run(begin, end, state)
                self._graphs.append(graph)
                if end is not None:
                    with _captured(expert_pool) as self._residents[end]:
                        self._run_residents(end, *self._router_outputs[-1], self._y, add=False)
                begin = len(layers) if end is None else end + 1
        torch.cuda.synchronize()

    def _run(self, begin: int, end: int | None, h: Tensor) -> Tensor:
        """The model from the experts of layer `begin` - 1 to those of layer `end`, or to the logits."""
        dense = self._model.config.leading_dense_block_count
        if begin == 0:
            h = self._model.embed(self._token[:1])
            for block in self._model.blk[:dense]:
                h = block.without_experts(h, self._cache)
        else:
            h = decode_kernels.gather(h, self._y, self._host_sum)
        last = len(self._layers) - 1 if end is None else end
        for layer in range(begin, last + 1):
            h, x, expert_ids, routing_weights = self._model.blk[dense + layer].before_experts(h, self._cache)
            self.chosen.append(expert_ids)
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
        weights = self._layers[layer]
        experts_of_one(
            x,
            self._orchestrator.residents.table[layer],
            routing_weights,
            weights.gate.shape[1],
            weights,
            expert_ids=expert_ids,
            into=into,
            add=add,
        )

    def _run_streamed(self, dtype: torch.dtype) -> None:
        width = self._y.shape[1]
        weights = next(weights for weights in self._layers if torch_type(weights) == dtype)
        experts_of_one(
            self._streamed_inputs[None, :width],
            self._jobs,
            self._streamed_inputs[width:],
            min(weights.gate.shape[1], self._orchestrator.ring.rows * self._orchestrator.ring.slots),
            weights,
            expert_ids=None,
            into=self._y,
            add=True,
        )

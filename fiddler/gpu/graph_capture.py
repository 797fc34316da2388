"""Captures a decode step of one token as CUDA graphs: replays cost Python and the driver next to nothing.

Knows the model's blocks, the graphs' tensors and streams; not which thread replays what, nor how work is divided.
Consecutive layers whose experts are all resident are one graph. After any other layer a graph ends: the host must read
which experts the router chose. The next graph begins with the sum of the GPU's and the CPU's experts.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.gpu import attention_kernels, decode_kernels
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.gpu.streamed_experts import StreamedExperts
from fiddler.models.config import Config
from fiddler.models.transformer import Transformer
from fiddler.offload.one_token import TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.runtime.block_pool import BlockPool, blocks_for
from fiddler.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

__all__ = ["CapturedGraphs", "DecodeCache"]


class DecodeCache:
    """The model's `Cache` for one token of one sequence, whose position and block table kernels read on the device.

    So one captured graph serves every position of every sequence.
    """

    def __init__(self, pool: BlockPool, place: Tensor, cos_sin: Tensor, config: Config) -> None:
        """place: int64, the position, then the sequence's block table, as `offsets` of the pool."""
        self._first, self._cos_sin, self._config = pool.memory[0], cos_sin, config
        self._row = torch.zeros(1, dtype=torch.int64, device=place.device)
        self._tables = attention_kernels.Tables(place[:1], place[1:], self._row)
        bounds, size = attention_kernels.latent_tiles([(0, 1)], config.head_count, pool.memory.dtype)
        self._tiles = attention_kernels.LatentTiles(bounds.to(place.device), size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`."""
        assert sinks is None, "models with sinks run on the CPU"
        latent, tables = self._config.latent is not None, self._tables
        keys, values = self._first[layer, 0], None if latent else self._first[layer, 1]
        q = attention_kernels.rotate_and_store(q, k, v, self._cos_sin, tables, keys, values)
        out = torch.empty_like(q)
        if values is None:
            attention_kernels.attend_latent(q, keys, tables, self._tiles, self._config.rotated, out)
        else:
            attention_kernels.attend_rows(q, keys, values, tables, self._row, self._config.window(layer), out)
        return out


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
    """The graphs of a decode step, for any one sequence in blocks of `pool`.

    `x` [1, D], `expert_ids` [1, K] and `routing_weights` [1, K], float32, are a layer's on the host after `wait`;
    `cpu_sum` [1, D] is read by the graph after it.
    """

    def __init__(
        self,
        model: Transformer,
        orchestrator: Orchestrator | None,
        pool: BlockPool,
        cos_sin: Tensor,
        recorder: Recorder,
    ) -> None:
        """cos_sin: of every position, see `rotate_and_store`. orchestrator: None for a model without experts.

        pool: its first memory stays where it is; the pool may grow.
        """
        config, device = model.config, pool.device
        self._model, self._experts, self._recorder = model, orchestrator, recorder
        self._layers = () if orchestrator is None else orchestrator.layers  # those with experts
        self._k = config.expert_used_count
        width = config.embedding_length
        numbers = 2 + blocks_for(len(cos_sin))  # token id, position, block table
        self._host_token = torch.zeros(numbers, dtype=torch.int64, pin_memory=True).numpy()
        self._token = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._cache = DecodeCache(pool, self._token[1:], cos_sin, config)
        self._host_inputs = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._streamed_inputs = torch.zeros(width + self._k, device=device)  # x and weights, for streamed experts
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._host_sum = torch.zeros(1, width, pin_memory=True)
        host_inputs = self._host_inputs.numpy()[None]
        self.x, self.expert_ids, self.routing_weights = np.split(host_inputs, [width, width + self._k], axis=1)
        self.cpu_sum = self._host_sum.numpy()
        self._token_copied = torch.cuda.Event()  # recorded after the copy of `_host_token`
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.breaks = [layer for layer in range(len(self._layers)) if not self._orchestrator.complete(layer)]
        self._arrived = [torch.cuda.Event() for _ in self.breaks]
        self._streamed: StreamedExperts | None = None
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        # of each layer int64 [1, K]; this reference stops later graphs from using their memory
        self.chosen: list[Tensor] = []
        self._router_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # of `before_experts`, one graph's for another
        self.hidden = self._logits = torch.empty(0)
        # of the last two steps, in turns: a step may be queued before the logits of the one before are read
        self._host_logits = [torch.zeros(1, config.vocab_size, pin_memory=True) for _ in range(2)]
        self._ended = [torch.cuda.Event() for _ in range(2)]  # recorded after their copies
        self._next_tokens = torch.zeros(2, dtype=torch.int64, pin_memory=True)  # of the last two positions, in turns
        self._steps = 0
        self._capture()

    @property
    def _orchestrator(self) -> Orchestrator:
        assert self._experts is not None, "only layers with experts need it"
        return self._experts

    def begin(self, token: int, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.begin`."""
        self._token_copied.synchronize()
        self._host_token[:2] = token, position
        self._send_token(0, table)
        if self._streamed is not None:
            self._streamed.begin()
        self._steps += 1
        self.queue(0)

    def begin_ahead(self, table: np.ndarray) -> None:
        """Implements `Graphs.begin_ahead`."""
        if not np.array_equal(self._host_token[2 : 2 + len(table)], table):
            self._token_copied.synchronize()
            self._send_token(2, table)
        self._steps += 1
        self.queue(0)

    def _send_token(self, begin: int, table: np.ndarray) -> None:
        """Queue the copy of `_host_token` from number `begin` on to the end of the table."""
        end = 2 + len(table)
        self._host_token[2:end] = table
        stream = torch.cuda.current_stream()
        target, source = self._token.data_ptr() + 8 * begin, self._host_token.ctypes.data + 8 * begin
        cuda_driver.copy_to_device(target, source, 8 * (end - begin), stream.cuda_stream)
        self._token_copied.record(stream)

    def queue(self, graph: int) -> None:
        """Queue a graph and the resident experts of the layer that ends it."""
        stream = torch.cuda.current_stream()
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()
        if graph == len(self.breaks):
            host, nbytes = self._host_logits[self._steps % 2], self._logits.numel() * self._logits.element_size()
            cuda_driver.copy_to_host(host.data_ptr(), self._logits.data_ptr(), nbytes, stream.cuda_stream)
            self._ended[self._steps % 2].record(stream)
            return
        self._arrived[graph].record(stream)
        with self._recorder.queued("experts"):
            self._residents[self.breaks[graph]].replay()

    def wait(self, graph: int) -> None:
        """Wait until `x`, `expert_ids` and `routing_weights` of the layer that ends this graph are on the host."""
        self._arrived[graph].synchronize()

    def logits(self, ahead: int = 0) -> Tensor:
        """Implements `Graphs.logits`."""
        slot = (self._steps - ahead) % 2
        self._ended[slot].synchronize()
        return self._host_logits[slot].clone()

    def next_token(self, position: int) -> int:
        """Implements `Graphs.next_token`."""
        return int(self._next_tokens[position % 2])

    def streamed(self, layer: int) -> bool:
        """Whether the streamed experts of this layer are computed already."""
        return self._streamed is not None and self._streamed.computed(layer)

    def send(self, layer: int, plan: TokenPlan) -> None:
        """Implements `Graphs.send`."""
        assert self._streamed is not None
        self._streamed.send(layer, plan)

    def stream(self) -> None:
        """Queue the kernels of the experts that were sent, after their copies; and whatever was left to send."""
        assert self._streamed is not None
        self._streamed.queue()

    def _capture(self) -> None:
        """Capture the graphs, after a run that compiles and loads their kernels."""
        layers = self._layers
        capture_stream = torch.cuda.Stream(self._y.device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream):
            if self.breaks:
                inputs = self._streamed_inputs, self._y
                token = self._orchestrator.bind_token(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)
                self._streamed = StreamedExperts(self._orchestrator, token, *inputs, self._recorder)
            self._run(0, None, self._y)
            for layer in self.breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            if self._streamed is not None:
                self._streamed.run()
            self._router_outputs.clear()
            self.chosen.clear()
            pool, expert_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            if self._streamed is not None:  # in a pool of their own: they run while the others' results are in use
                self._streamed.capture(partial(_captured, expert_pool))
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
            self._logits = self._model.logits(h)
            decode_kernels.next_token(self._logits, self._token, self._next_tokens)
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

"""Captures a decode step of one token as CUDA graphs: replays cost Python and the driver next to nothing.

Knows the model's blocks, the graphs' tensors and streams; not which thread replays what, nor how work is divided.
Consecutive layers whose experts are all resident are one graph. After any other layer a graph ends: the host must read
which experts the router chose. The next graph begins with the sum of the GPU's and the CPU's experts.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.gpu import decode_kernels
from fiddler.gpu.capture import captured
from fiddler.gpu.decode_cache import DecodeCache
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.gpu.host_choices import HostChoices
from fiddler.gpu.host_logits import HostLogits
from fiddler.gpu.streamed_experts import StreamedExperts
from fiddler.kernels.one_token import Signal
from fiddler.models.transformer import Transformer
from fiddler.offload.host_read_kernels import numbers_from_host
from fiddler.offload.one_token import TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.token_signals import TokenSignals
from fiddler.runtime.block_pool import BlockPool, blocks_for
from fiddler.telemetry.recorder import Recorder

__all__ = ["CapturedGraphs"]


class CapturedGraphs:
    """The graphs of a decode step, for any one sequence in blocks of `pool`.

    `x` [1, D], `expert_ids` [1, K] and `routing_weights` [1, K], float32, are a layer's on the host once the signal
    ARRIVED has its number; `cpu_sum` [1, D] is read by the graph after it, once SUMMED has.
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
        zeros = partial(torch.zeros, 2 + blocks_for(len(cos_sin)), dtype=torch.int64)  # token id, position, block table
        self._host_token, self._token = zeros(pin_memory=True).numpy(), zeros(device=device)
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
        self.breaks = [] if orchestrator is None else orchestrator.incomplete
        self._signals: TokenSignals | None = None
        self._streamed: StreamedExperts | None = None
        self._residents: dict[int, torch.cuda.CUDAGraph] = {}
        # of each layer int64 [1, K]; this reference stops later graphs from using their memory
        self._chosen: list[Tensor] = []
        self._router_outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # of `before_experts`, one graph's for another
        self.hidden = self._logits = torch.empty(0)
        self._host_logits = HostLogits()
        self._choices = HostChoices(len(self._layers), self._k)
        self._choose: torch.cuda.CUDAGraph | None = None  # of the next token, where experts are missing
        self._begun_ahead: int | None = None  # the first number of a step whose experts are missing
        self._capture()

    @property
    def _orchestrator(self) -> Orchestrator:
        assert self._experts is not None, "only layers with experts need it"
        return self._experts

    def begin(self, token: int, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.begin`."""
        if (ahead := self._begun_ahead) is not None:
            while not self._numbers.is_at(Signal.ARRIVED, ahead):  # else it could choose a token later
                self.check()
            self._numbers.skip_to(ahead + len(self.breaks))
            self._begun_ahead = None
        self._token_copied.synchronize()
        self._host_token[:2] = token, position
        self._host_token[2 : 2 + len(table)] = table
        self._take_token.replay()
        self._replay(0)
        if self.breaks:
            self._numbers.begin(len(self.breaks))
            self._end(0)
        self._token_copied.record()  # while the GPU runs that graph, as the rest
        self._host_logits.begin(self._logits)
        if self.breaks:
            self._streaming.begin()
        else:
            self._end(0)

    def begin_ahead(self, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.begin_ahead`."""
        if not np.array_equal(self._host_token[2 : 2 + len(table)], table):
            self._token_copied.synchronize()
            self._copy_table(table)
            self._token_copied.record()
        if self._choose is None:
            self._host_logits.begin(self._logits)
            self._replay(0)
            self._end(0)
            return
        self._choices.expect(position - 1)
        self._choose.replay()
        self._replay(0)
        self._numbers.write(Signal.ARRIVED, self._numbers.next)
        self._begun_ahead = self._numbers.next
        self._host_logits.reserve(self._logits)

    def take_ahead(self) -> None:
        """Implements `Graphs.take_ahead`."""
        self._numbers.begin(len(self.breaks))
        self._begun_ahead = None  # only now: a step that is interrupted before begins with its numbers again
        self._host_logits.begin(self._logits)
        self._streaming.begin()

    def _copy_table(self, table: np.ndarray) -> None:
        """Queue the copy of `_host_token` from the table on: the token and its position are the GPU's."""
        self._host_token[2 : 2 + len(table)] = table
        target, source = self._token.data_ptr() + 16, self._host_token.ctypes.data + 16
        cuda_driver.copy_to_device(target, source, 8 * len(table), torch.cuda.current_stream().cuda_stream)

    def number(self, graph: int) -> int:
        """Implements `Graphs.number`."""
        return self._numbers.first + graph

    def queue(self, graph: int) -> None:
        """Implements `Graphs.queue`."""
        number, layer = self.number(graph - 1), self.breaks[graph - 1]
        with self._recorder.queued("experts"):
            self._residents[layer].replay()
        self._streaming.queue(layer, number)
        self._numbers.wait(Signal.SUMMED, number)
        self._replay(graph)
        self._end(graph)

    def _replay(self, graph: int) -> None:
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()

    def _end(self, graph: int) -> None:
        """Queue the signal that a graph's outputs are on the host, or the copy of the logits."""
        if graph == len(self.breaks):
            self._host_logits.copy(self._logits)
            return
        self._numbers.write(Signal.ARRIVED, self.number(graph))

    def send(self, layer: int, number: int, plan: TokenPlan) -> None:
        """Implements `Graphs.send`."""
        self._streaming.send(layer, number, plan)

    def send_when_divided(self, graph: int) -> bool:
        """Implements `Graphs.send_when_divided`."""
        return self._streaming.send_when_divided(self.breaks[graph], self.number(graph))

    def open(self, graph: int) -> None:
        """Implements `Graphs.open`."""
        self._numbers.set(Signal.SUMMED, self.number(graph))

    def streamed(self, graph: int) -> bool:
        """Implements `Graphs.streamed`."""
        return self._streaming.computed(self.number(graph))

    def stop(self) -> None:
        """Implements `Graphs.stop`."""
        self._numbers.stop()

    def end(self) -> None:
        """Implements `Graphs.end`."""
        self._numbers.end()

    def check(self) -> None:
        """Implements `Graphs.check`."""
        torch.cuda.current_stream().query()

    @property
    def _streaming(self) -> StreamedExperts:
        assert self._streamed is not None, "only steps with missing experts need it"
        return self._streamed

    @property
    def _numbers(self) -> TokenSignals:
        assert self._signals is not None, "only steps with missing experts need them"
        return self._signals

    def logits(self, ahead: int = 0) -> Tensor:
        """Implements `Graphs.logits`."""
        return self._host_logits.read(ahead)

    def next_token(self, position: int) -> int:
        """Implements `Graphs.next_token`."""
        return self._choices.token(position, self.check)

    def chosen_at(self, position: int) -> Tensor:
        """Implements `Graphs.chosen_at`."""
        return self._choices.expert_ids(position)

    def _capture(self) -> None:
        """Capture the graphs, after a run that compiles and loads their kernels."""
        layers = self._layers
        capture_stream = torch.cuda.Stream(self._y.device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream):
            if self.breaks:
                chunks = self._orchestrator.ring.token_chunks(self._k)
                self._signals = signals = TokenSignals(chunks, pinned=True)
                bound = self.x, self.expert_ids, self.routing_weights, self.cpu_sum
                token = self._orchestrator.bind_token(*bound, signals)
                inputs = self._streamed_inputs, self._y
                self._streamed = StreamedExperts(self._orchestrator, token, signals, *inputs, self._recorder)
            numbers_from_host(self._host_token.ctypes.data, self._token)
            self._run(0, None, self._y)
            for layer in self.breaks[:1]:
                self._run(layer + 1, None, self._run(layer, layer, self._y))
            if self._streamed is not None:
                self._streamed.run()
                self._choices.queue_token(self._logits, self._token)
            self._router_outputs.clear()
            self._chosen.clear()
            pool, expert_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            if self._streamed is not None:  # in a pool of their own: they run while the others' results are in use
                self._streamed.capture(partial(captured, expert_pool))
            with captured(pool) as self._take_token:
                numbers_from_host(self._host_token.ctypes.data, self._token)
            begin, state = 0, self._y
            for end in [*self.breaks, None]:
                with captured(pool) as graph:
                    state = self._run(begin, end, state)
                self._graphs.append(graph)
                if end is not None:
                    with captured(expert_pool) as self._residents[end]:
                        self._run_residents(end, *self._router_outputs[-1], self._y, add=False)
                begin = len(layers) if end is None else end + 1
            if self.breaks:
                with captured(pool) as self._choose:
                    self._choices.queue_token(self._logits, self._token)
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
            self._chosen.append(expert_ids)
            if layer == end:
                decode_kernels.hand_over(x, expert_ids, routing_weights, self._streamed_inputs, self._host_inputs)
                self._router_outputs.append((x, expert_ids, routing_weights))
            else:
                self._run_residents(layer, x, expert_ids, routing_weights, h, add=True)
        if end is None:
            self.hidden = h
            self._logits = self._model.logits(h)
            self._choices.queue_expert_ids(self._chosen, self._token)
            if not self.breaks:  # else a graph of its own, if a step is begun ahead
                self._choices.queue_token(self._logits, self._token)
        return h

    def _run_residents(
        self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor, into: Tensor, *, add: bool
    ) -> None:
        weights, biases = self._layers[layer], self._orchestrator.biases
        experts_of_one(
            x,
            self._orchestrator.residents.table[layer],
            routing_weights,
            weights.gate.shape[1],
            weights,
            expert_ids=expert_ids,
            into=into,
            add=add,
            biases=None if biases is None else biases.of_layer(layer),
        )

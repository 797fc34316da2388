"""Captures a decode step of one token as CUDA graphs: replays cost Python and the driver next to nothing.

Knows the model's blocks, the graphs' tensors and streams; not which thread replays what, nor how work is divided.
The first graph ends with the first layer some of whose experts are missing: the host must read which ones the router
chose. Others follow it, of some such layers each, with kernels that wait for the copies and the CPU's sum of each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fiddler.gpu.capture import captured
from fiddler.gpu.decode_cache import DecodeCache
from fiddler.gpu.graphs import piece_sizes
from fiddler.gpu.host_choices import HostChoices
from fiddler.gpu.host_logits import HostLogits
from fiddler.gpu.resident_experts import run_residents
from fiddler.gpu.signal_kernels import Signals, hand_over, run_each_kind, take_sums, tell_and_wait
from fiddler.gpu.step_inputs import StepInputs
from fiddler.gpu.streamed_experts import StreamedExperts
from fiddler.kernels.one_token import Signal
from fiddler.models.transformer import Transformer
from fiddler.offload.one_token import TokenInputs, TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.token_signals import Place, TokenSignals
from fiddler.runtime.block_pool import BlockPool, blocks_for
from fiddler.telemetry.recorder import Recorder

__all__ = ["CapturedGraphs"]

_NO_SIGNALS = Signals()


class CapturedGraphs:
    """The graphs of a decode step, for any one sequence in blocks of `pool`.

    `x` [1, D], `expert_ids` [1, K] and `routing_weights` [1, K], float32, are a layer's on the host once the signal
    ARRIVED has its number; `cpu_sum` [1, D] is read once SUMMED has.
    """

    _sizes = staticmethod(piece_sizes)

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
        config, device, width = model.config, pool.device, model.config.embedding_length
        self._model, self._experts, self._recorder = model, orchestrator, recorder
        self._layers = () if orchestrator is None else orchestrator.layers  # those with experts
        self._k = config.expert_used_count
        self._inputs = StepInputs(blocks_for(len(cos_sin)), device)
        self._token = self._inputs.token  # int64: id, position, block table
        self._cache = DecodeCache(pool, self._token[1:], cos_sin, config)
        self._host_inputs = torch.zeros(width + 2 * self._k, pin_memory=True)  # a layer's x [D], ids [K], weights [K]
        self._streamed_inputs = torch.zeros(width + self._k, device=device)  # x and weights, for streamed experts
        self._y = torch.zeros(1, width, device=device)  # the GPU's sum of a layer
        self._host_sum = torch.zeros(1, width, pin_memory=True)
        host_inputs = self._host_inputs.numpy()[None]
        self.x, self.expert_ids, self.routing_weights = np.split(host_inputs, [width, width + self._k], axis=1)
        self.cpu_sum = self._host_sum.numpy()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.breaks = [] if orchestrator is None else orchestrator.incomplete
        self.pieces = self._sizes(len(self.breaks))
        self._streamed: StreamedExperts | None = None
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

    def begin(self, *, ahead: bool) -> None:
        """Implements `Graphs.begin`."""
        if not ahead and (number := self._begun_ahead) is not None:
            while not self._numbers.is_at(Signal.ARRIVED, number):  # else it could choose a token later
                self.check()
            self._numbers.skip_to(number + len(self.breaks))
        self._numbers.begin(len(self.breaks))
        self._begun_ahead = None  # only now: a step that is interrupted before begins with its numbers again
        self._streaming.begin()
        self._host_logits.begin(self._logits)

    def launch(self, token: int, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.launch`."""
        self._inputs.queue(self.number(0) if self.breaks else 0, token, position, table)
        self._replay(0)
        if self.breaks:
            self._arrive(self.number(0))
        else:
            self._inputs.copied()  # while the GPU runs that graph, as the rest
            self._host_logits.begin(self._logits)
            self._host_logits.copy(self._logits)

    def begin_ahead(self, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.begin_ahead`."""
        self._inputs.queue_table(table)
        if self._choose is None:
            self._host_logits.begin(self._logits)
            self._replay(0)
            self._host_logits.copy(self._logits)
            return
        self._choices.expect(position - 1)
        self._choose.replay()
        self._replay(0)
        self._arrive(self._numbers.next)
        self._begun_ahead = self._numbers.next

    def number(self, index: int) -> int:
        """Implements `Graphs.number`."""
        return self._numbers.first + index

    def queue(self, piece: int) -> None:
        """Implements `Graphs.queue`."""
        self._replay(1 + piece)
        if piece == len(self.pieces) - 1:
            self._host_logits.copy(self._logits)

    def reserve(self) -> None:
        """Implements `Graphs.reserve`."""
        self._host_logits.reserve(self._logits)

    def _replay(self, graph: int) -> None:
        with self._recorder.queued("dense"):
            self._graphs[graph].replay()

    def _arrive(self, number: int) -> None:
        """Queue the signal that the first graph's outputs are on the host, unless the graph has it."""

    def send(self, layer: int, number: int, plan: TokenPlan) -> None:
        """Implements `Graphs.send`."""
        self._streaming.send(layer, number, plan)

    def send_when_divided(self, index: int) -> bool:
        """Implements `Graphs.send_when_divided`."""
        return self._streaming.send_when_divided(self.breaks[index], self.number(index))

    def streamed(self, index: int) -> bool:
        """Implements `Graphs.streamed`."""
        return self._streaming.computed(self.number(index))

    def stop(self) -> None:
        """Implements `Graphs.stop`."""
        self._numbers.stop()

    def end(self) -> None:
        """Implements `Graphs.end`."""
        self._numbers.end()
        self._inputs.were_read()

    def check(self) -> None:
        """Implements `Graphs.check`."""
        torch.cuda.current_stream().query()

    @property
    def _streaming(self) -> StreamedExperts:
        assert self._streamed is not None, "only steps with missing experts need it"
        return self._streamed

    @property
    def _numbers(self) -> TokenSignals:
        return self._streaming.signals

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
        capture_stream = torch.cuda.Stream(self._y.device)
        capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream):
            if self.breaks:
                on_host = TokenInputs(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)
                inputs = self._streamed_inputs, self._y
                self._streamed = StreamedExperts(self._orchestrator, on_host, *inputs, self._recorder)
            self._inputs.run()
            self._run(0, None, self._y)
            if self._streamed is not None:
                layer, place = self.breaks[0], self._numbers.place(Signal.SUMMED, 0)
                for signals in (_NO_SIGNALS, Signals(place, place, place)):
                    state = self._run(layer, layer, self._y, signals)
                    for begin in (layer + 1, len(self._layers)):
                        self._run(begin, None, state, signals)
                self._streamed.run()
                run_each_kind(self._inputs.first, place)
                self._inputs.advance(0)
                self._choices.queue_token(self._logits, self._token)
            self._router_outputs.clear()
            self._chosen.clear()
            pool = torch.cuda.graph_pool_handle()
            self._inputs.capture(pool)
            self._capture_graphs(pool)
            if self.breaks:
                with captured(pool) as self._choose:
                    self._choices.queue_token(self._logits, self._token)
                    self._inputs.advance(len(self.breaks))
        torch.cuda.synchronize()
        self._replay_all()

    def _capture_graphs(self, pool: torch.cuda._POOL_HANDLE) -> None:
        """Capture the first graph, and one of each piece."""
        ends, begin = [*self.breaks, None], 0
        with captured(pool) as graph:
            state = self._run(0, ends[0], self._y, Signals(arrived=self._arrived(0)))
        self._graphs.append(graph)
        for size in self.pieces:
            with captured(pool) as graph:
                for index in range(begin, begin + size):
                    computed = self._run_experts(index)
                    summed = self._numbers.place(Signal.SUMMED, index)
                    signals = Signals(computed, summed, self._arrived(index + 1))
                    state = self._run(self.breaks[index] + 1, ends[index + 1], state, signals)
            begin += size
            self._graphs.append(graph)

    def _replay_all(self) -> None:
        """Replay each graph once, which loads it: the driver may let that wait for kernels, which then wait in vain."""
        first = 0
        if self.breaks:
            first = self._numbers.begin(len(self.breaks))
            self._numbers.release()
        self._inputs.queue(first, 0, 0, np.zeros(0, np.int64))
        for graph in [*self._graphs, *([] if self._choose is None else [self._choose])]:
            graph.replay()
        self._inputs.copied()
        torch.cuda.synchronize()

    def _arrived(self, index: int) -> Place | None:
        """The signal that the inputs of the layer `breaks[index]` are on the host, if there is that layer."""
        return self._numbers.place(Signal.ARRIVED, index) if index < len(self.breaks) else None

    def _run_experts(self, index: int) -> Place | None:
        """Run the residents of the layer `breaks[index]`, then what is streamed, once it is there.

        Returns the signal that the last of it is used, which is still to be told.
        """
        layer, first, signals, told = self.breaks[index], self._inputs.first, self._numbers, None
        run_residents(self._orchestrator, layer, self._router_outputs[index], self._y, add=False)
        for chunk in range(self._streaming.chunks):
            tell_and_wait(first, told, signals.place_of_chunk(Signal.SENT, index, chunk))
            self._streaming.run_chunk(layer, chunk)
            told = signals.place_of_chunk(Signal.COMPUTED, index, chunk)
        return told

    def _run(self, begin: int, end: int | None, h: Tensor, signals: Signals = _NO_SIGNALS) -> Tensor:
        """The model from the experts of layer `begin` - 1 to those of layer `end`, or to the logits."""
        dense, first, normalised = self._model.config.leading_dense_block_count, self._inputs.first, None
        if begin == 0:
            h = self._model.embed(self._token[:1])
            for block in self._model.blk[:dense]:
                h = block.without_experts(h, self._cache)
        else:
            norm = self._model.blk[dense + begin].norm_weight if begin < len(self._layers) else None
            sums = h, self._y, self._host_sum, norm, self._model.config.rms_epsilon
            h, normalised = take_sums(*sums, first, signals.computed, signals.summed)
        last = len(self._layers) - 1 if end is None else end
        for layer in range(begin, last + 1):
            block = self._model.blk[dense + layer]
            h, x, expert_ids, routing_weights = block.before_experts(h, self._cache, normalised=normalised)
            normalised = None
            self._chosen.append(expert_ids)
            if layer == end:
                inputs = x, expert_ids, routing_weights
                hand_over(*inputs, self._streamed_inputs, self._host_inputs, first, signals.arrived)
                self._router_outputs.append(inputs)
            else:
                run_residents(self._orchestrator, layer, (x, expert_ids, routing_weights), h, add=True)
        if end is None:
            self.hidden = h
            self._logits = self._model.logits(h)
            self._choices.queue_expert_ids(self._chosen, self._token)
            if not self.breaks:  # else a graph of its own, if a step is begun ahead
                self._choices.queue_token(self._logits, self._token)
        return h

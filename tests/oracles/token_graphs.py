"""A thread in a GPU's place for steps of single tokens: it runs what is queued, in order, and waits at the signals."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch

from fiddler.gpu.graphs import piece_sizes
from fiddler.kernels.one_token import Signal
from fiddler.kernels.token_copies import JOB
from fiddler.offload.feed_forward import feed_forward
from fiddler.offload.one_token import TokenInputs
from fiddler.offload.staging_ring import Part
from fiddler.offload.token_signals import TokenSignals
from oracles import naive

POLL = 1e-5


def likely_after(token):
    """The token of the largest logit after this one."""
    return (7 * token + 3) % 50


def run(queue, errors):
    """Do what is queued, until None is."""
    while (work := queue.get()) is not None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)
        del work


class RandomGraphs:
    """Implements `Graphs`: what a graph hands to the host is random; streamed experts are computed from the ring.

    late: seconds by which the GPU is late with the streamed experts of a layer. slow: seconds that `queue` takes.
    divided: says `pieces` of so many layers.
    Of each layer of the last step, without one that was only begun ahead: `inputs` x, expert ids and routing weights;
    `gpu_rows` hidden rows that were streamed, by expert; `gpu_sums` and `sums`, the GPU's and the CPU's, which the next
    graph reads. `history`: token and position of each step that was begun. Valid after `synchronize`.
    """

    divided = staticmethod(piece_sizes)

    def __init__(self, experts, k, late=0.0, seed=0):
        (self.experts, _, self.width), self.late, self.k = experts.layers[0].shape, late, k
        self.breaks, self.hidden = [*range(len(experts.layers))], torch.zeros(1, self.width)
        self.x, self.cpu_sum = (np.full((1, self.width), np.nan, np.float32) for _ in range(2))
        self.expert_ids, self.routing_weights = (np.zeros((1, k), np.float32) for _ in range(2))
        self.ring, self.layers, self.random = experts.ring, experts.layers, np.random.default_rng(seed)
        self.biases = None if experts.biases is None else experts.biases.hidden
        chunks = self.ring.token_chunks(k)
        self.signals = TokenSignals(chunks, pinned=False)
        on_host = TokenInputs(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)
        token = experts.bind_token(on_host, self.signals)
        jobs = np.zeros((chunks, k, JOB), np.int64)
        self.jobs = np.zeros_like(jobs)  # on the GPU
        self.copies = self.ring.token_copies(token.division, jobs, self.jobs.ctypes.data)
        self.slow, self.fails, self.sent_here, self.sent_there = 0.0, False, 0, 0
        self.history, self.token, self.begun_ahead, self.chosen_tokens = [], None, False, [None, None]
        self._records = []  # of each step: `inputs`, `gpu_rows`, `gpu_sums`, `sums`
        self._queue, self.errors = SimpleQueue(), []
        threading.Thread(target=run, args=(self._queue, self.errors), daemon=True).start()
        weakref.finalize(self, self._queue.put, None).atexit = False

    def synchronize(self):
        done = threading.Event()
        self._queue.put(done.set)
        assert done.wait(10), "the GPU waits for a signal that nobody sets"

    def chosen_at(self, position):
        self.synchronize()
        assert self.history[-2 if self.begun_ahead else -1][1] == position
        return torch.cat([torch.from_numpy(expert_ids) for _, expert_ids, _ in self.inputs])

    @property
    def inputs(self):
        return self._record(0)

    @property
    def gpu_rows(self):
        return self._record(1)

    @property
    def gpu_sums(self):
        return self._record(2)

    @property
    def sums(self):
        return self._record(3)

    def _record(self, index):
        return self._records[-2 if self.begun_ahead else -1][index]

    def begin(self, *, ahead):
        if self.begun_ahead and not ahead:
            self._wait(Signal.ARRIVED, self.signals.next)
            self.signals.skip_to(self.signals.next + len(self.breaks))
        self.begun_ahead = False
        self.signals.begin(len(self.breaks))
        self.ring.begin_token()

    def launch(self, token, position, table):
        self._queue.put(partial(self._token, token, position))
        self._queue.put(partial(self._graph, 0, self.number(0)))

    def begin_ahead(self, position, table):
        assert self.token[1] == position - 1
        self.chosen_tokens[(position - 1) % 2] = None
        self._queue.put(self._choose)
        self._queue.put(partial(self._graph, 0, self.signals.next))
        self.begun_ahead = True

    def next_token(self, position):
        while (token := self.chosen_tokens[position % 2]) is None:
            time.sleep(POLL)
        return token

    def _choose(self):
        token, position = self.token
        self.chosen_tokens[position % 2] = likely_after(token)
        self._token(likely_after(token), position + 1)

    def _token(self, token, position):
        self.token = token, position

    def number(self, index):
        return self.signals.first + index

    @property
    def pieces(self):
        return self.divided(len(self.breaks))

    def queue(self, piece):
        if self.fails:
            raise ValueError("broken off")
        time.sleep(self.slow)
        begin = sum(self.pieces[:piece])
        for index in range(begin, begin + self.pieces[piece]):
            self._queue_layer(index + 1)

    def reserve(self):
        pass

    def _queue_layer(self, graph):
        number, layer = self.number(graph - 1), graph - 1
        for chunk in range(len(self.jobs)):
            self._queue.put(partial(self._wait, Signal.SENT, self.signals.chunk(number, chunk)))
            self._queue.put(partial(self._stream, layer, chunk))
            self._queue.put(partial(self.signals.set, Signal.COMPUTED, self.signals.chunk(number, chunk)))
        self._queue.put(partial(self._wait, Signal.SUMMED, number))
        self._queue.put(partial(self._graph, graph, number + 1))

    def _wait(self, signal, number):
        while not self.signals.is_at(signal, number):
            time.sleep(POLL)

    def _graph(self, graph, number):
        if graph == 0:
            self.history.append(self.token)
            self._records = [*self._records[-1:], ([], [], [], [])]
        inputs, gpu_rows, gpu_sums, sums = self._records[-1]
        if graph:
            sums.append(self.cpu_sum.copy())
        if graph < len(self.breaks):
            self.x[:] = self.random.normal(size=self.width)
            self.expert_ids[:] = self.random.permutation(self.experts)[: self.k]
            self.routing_weights[:] = self.random.random(self.k)
            inputs.append((self.x.copy(), self.expert_ids.astype(np.int64), self.routing_weights.copy()))
            gpu_rows.append({})
            gpu_sums.append(np.zeros((1, self.width)))
            self.signals.set(Signal.ARRIVED, number)

    def _stream(self, layer, chunk):
        time.sleep(self.late)
        inputs, gpu_rows, gpu_sums, _ = self._records[-1]
        x, expert_ids, routing_weights = inputs[layer]
        rows_of, formats = gpu_rows[layer], self.layers[layer].matrix_formats
        for *addresses, rows, j, first in self.jobs[chunk].tolist():
            if rows == 0:
                continue
            expert = int(expert_ids[0, j])
            rows_of[expert] = rows_of.get(expert, 0) + rows
            part = Part(expert, 0, rows, None, 0, self.ring._memory, addresses, self.width, formats)
            biases = None if self.biases is None else [each[first : first + rows] for each in self.biases[:2]]
            options = {"biases": biases, "clamped": self.layers[layer].clamped}
            y = feed_forward(torch.from_numpy(x), *part.matrices(), rounded=False, work=1 << 20, **options).numpy()
            gpu_sums[layer] += routing_weights[0, j] * y

    def send(self, layer, number, plan):
        self.sent_here += 1
        assert self.copies.send(layer, number) == 0

    def send_when_divided(self, index):
        there = self.signals.is_at(Signal.QUEUED, self.number(index))  # the caller sent it
        result = self.copies.send_when_divided(self.breaks[index], self.number(index))
        self.sent_there += result == 0 and not there
        return result == 0

    def streamed(self, index):
        last = self.signals.chunk(self.number(index), len(self.jobs) - 1)
        return self.signals.is_at(Signal.COMPUTED, last)

    def end(self):
        self.signals.end()

    def check(self):
        for error in self.errors:
            raise error

    def stop(self):
        self.signals.stop()

    def logits(self, ahead=0):
        return torch.zeros(1, 1)


def of_bf16(w, *inputs):
    """The sum in float64, and its tolerance."""
    return naive.expert_ffn(*inputs, w.gate, w.up, w.down, "bf16", rounded=False)


def check_step(graphs, experts, in_float64=of_bf16):
    """Assert that both sides together computed each layer's missing experts, by float64; returns the streamed rows."""
    graphs.synchronize()
    streamed = 0
    assert len(graphs.sums) == len(graphs.breaks)
    for layer, (x, expert_ids, routing_weights) in enumerate(graphs.inputs):
        w = experts.layers[layer]
        missing = np.array([[(layer, e) not in experts.residents for e in expert_ids[0].tolist()]])
        expected, tolerance = in_float64(w, x, expert_ids, routing_weights * missing)
        assert (np.abs(graphs.sums[layer] + graphs.gpu_sums[layer] - expected) <= 2 * tolerance + 1e-6).all()
        assert all((layer, e) not in experts.residents for e in graphs.gpu_rows[layer])
        streamed += sum(graphs.gpu_rows[layer].values())
    return streamed

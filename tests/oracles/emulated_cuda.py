"""CUDA's stream, events and graphs on the CPU, for steps whose kernels run in Triton's interpreter.

A thread is the stream: it does what is queued, in order, and waits at signals. What is captured is recorded, torch's
operations and kernels' launches; a replay does it again, into the same memory. A pool's memory is never reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from queue import SimpleQueue
from typing import ClassVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fiddler.device import cuda_driver
from fiddler.kernels.one_token import Signal

PATIENCE = 120  # seconds


class Stream:
    """The only stream."""

    cuda_stream = 0
    work: ClassVar = SimpleQueue()
    errors: ClassVar = []

    def __init__(self, device=None): ...

    def wait_stream(self, stream): ...

    def query(self):
        assert not self.errors, self.errors
        return True

    def synchronize(self):
        event = Event()
        event.record()
        event.synchronize()


class Event:
    """CUDA's event: reached at first."""

    def __init__(self):
        self._reached = threading.Event()
        self._reached.set()

    def record(self, stream=None):
        self._reached = threading.Event()
        Stream.work.put(self._reached.set)

    def synchronize(self):
        assert self._reached.wait(PATIENCE), "the stream waits for a signal that nobody sets"

    def query(self):
        return self._reached.is_set()


def run_stream():
    """Do what is queued, until None is."""
    with torch.inference_mode():
        while (work := Stream.work.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - `query` raises it
                Stream.errors.append(error)


class Graph:
    """What was recorded: functions, their arguments and their results."""

    recorded = None  # of the graph that is being captured

    def __init__(self):
        self.calls = []

    def replay(self):
        Stream.work.put(self._run)

    def _run(self):
        for function, arguments, options, result in self.calls:
            again = function(*arguments, **options)
            if "empty" in str(function):
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and _storage(old) != _storage(new):
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        Graph.recorded.append((function, arguments, options or {}, result))
        return result


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def captured(pool):
    """In place of `capture.captured`."""
    graph = Graph()
    Graph.recorded = graph.calls
    try:
        with _Recorder():
            yield graph
    finally:
        Graph.recorded = None


def _bytes(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _copy(target, source, size, stream):
    Stream.work.put(lambda: np.copyto(_bytes(target, size), _bytes(source, size)))


def _write(stream, address, number):
    Stream.work.put(lambda: ctypes.c_uint32.from_address(address).__setattr__("value", number))


def _wait(stream, address, number):
    def wait():
        while (ctypes.c_uint32.from_address(address).value - number) & 0xFFFFFFFF >= 1 << 31:
            time.sleep(1e-3)

    Stream.work.put(wait)
    return True


def _unpinned(make):
    return lambda *size, pin_memory=False, **options: make(*size, **options)


@contextlib.contextmanager
def emulated_cuda(monkeypatch):
    """Let the graphs of single tokens run without a GPU."""
    from triton.runtime import interpreter

    from fiddler.gpu import graph_capture, step_inputs, stream_wait_graphs

    launch = interpreter.GridExecutor.__call__

    def recorded(executor, *arguments, **options):
        if Graph.recorded is not None:
            Graph.recorded.append((launch, (executor, *arguments), options, None))
            if options.get("WAIT"):  # nobody tells it while it is captured
                return
        with _disable_current_modes():
            launch(executor, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    for module in (graph_capture, step_inputs, stream_wait_graphs):
        monkeypatch.setattr(module, "captured", captured)
    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, _unpinned(getattr(torch, name)))
    for name, value in {"Stream": Stream, "Event": Event, "graph_pool_handle": int}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", Stream().synchronize)
    drivers = {"copy_to_device": _copy, "copy_to_host": _copy, "write_value": _write, "wait_for_value": _wait}
    for name, value in drivers.items():
        monkeypatch.setattr(cuda_driver, name, value)
    Stream.errors.clear()
    thread = threading.Thread(target=run_stream, daemon=True)
    thread.start()
    yield
    Stream.work.put(None)
    thread.join(PATIENCE)
    assert not Stream.errors, Stream.errors


def patient(decoder, monkeypatch):
    """Let both threads of a step sleep while the stream's works: waiting awake, they would take its cores."""
    graphs, compute, send = decoder._graphs, decoder._compute, decoder._graphs.send_when_divided

    def computed(index, queueing):
        while not graphs._numbers.is_at(Signal.ARRIVED, graphs.number(index)):
            graphs.check()
            time.sleep(1e-3)
        return compute(index, queueing)

    def sent(index):
        if not (done := send(index)):
            time.sleep(1e-3)
        return done

    monkeypatch.setattr(decoder, "_compute", computed)
    monkeypatch.setattr(graphs, "send_when_divided", sent)

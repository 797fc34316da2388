"""Copies of one token's experts: the rows, their jobs, borders that no copy may cross, chunks, failures."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler.device import cuda_driver
from fiddler.device.c_functions import Copy2D
from fiddler.errors import ResourceError
from fiddler.kernels.machine.signals import SIGNAL_STRIDE
from fiddler.kernels.one_token import NOT_YET, Signal, TokenDivision, divide
from fiddler.kernels.token_copies import JOB, Layout, TokenCopies

K, F, WIDTH, STREAM = 3, 64, 24, 5
ROWS, DOWN = WIDTH * 2, WIDTH * F // 32 * 34  # bytes of a hidden row of gate, and of all of down
VOID = ctypes.c_void_p
COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, VOID, ctypes.c_size_t, VOID)
COPY_ROWS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Copy2D), VOID)
WRITE = ctypes.CFUNCTYPE(ctypes.c_int, VOID, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)


class Device:
    """Copies at once, and notes what it was told. fails: the number of the call that fails."""

    def __init__(self, experts, rows=K * F, borders=(), fails=None, seed=0, layers=2):
        self.calls, self.pieces, self.fails = 0, [], fails
        self.memory = np.random.default_rng(seed).integers(0, 256, (layers, 3, experts, F * ROWS), dtype=np.uint8)
        self.chosen = np.zeros((1, K), np.float32)
        self.signals = np.zeros(len(Signal) * SIGNAL_STRIDE, np.uint32)
        self.division = TokenDivision(self.chosen, experts, F, self.signals)
        self.ring = np.zeros(3 * K * (rows * ROWS + 64), np.uint8)
        self.host_jobs = np.full((TokenCopies.chunks(K, F, rows), K, JOB), -1)
        self.jobs = np.zeros_like(self.host_jobs)
        self.functions = COPY(self.copy), COPY_ROWS(self.copy_rows), WRITE(self.write)
        strides = self.memory.strides
        offsets = np.arange(3)[:, None] * strides[1] + np.arange(experts) * strides[2]
        borders = tuple(self.memory.ctypes.data + offset for offset in sorted(borders))
        self.borders = borders
        self.copies = TokenCopies(
            self.division,
            [
                Layout(self.memory[layer].ctypes.data + offsets, (ROWS, ROWS), (32, 34))  # down: blocks as of Q8_0
                for layer in range(layers)
            ],
            WIDTH,
            (self.ring.ctypes.data, self.ring.nbytes),
            rows,
            (*(ctypes.cast(each, VOID).value for each in self.functions), STREAM, borders),
            self.host_jobs,
            self.jobs.ctypes.data,
        )

    def signal(self, which):
        return int(self.signals[which * SIGNAL_STRIDE])

    def divide(self, ids, rows, number=1):
        """rows: the GPU's of each expert."""
        self.chosen[:] = ids
        self.signals[Signal.ARRIVED * SIGNAL_STRIDE] = number
        plans = self.division.plans([*[(0,) * n for n in range(K)], rows])
        experts = self.memory.shape[2]
        divide(self.division.arrays(np.ones(experts, np.bool_), np.zeros(experts, np.int64)), number, F, plans)

    def fail(self):
        self.calls += 1
        return 700 if self.calls == self.fails else 0

    def copy(self, target, source, nbytes, stream):
        if (result := self.fail()) == 0:
            assert stream == STREAM
            self.pieces.append((source, source + nbytes))
            ctypes.memmove(target, source, nbytes)
        return result

    def copy_rows(self, copy, stream):
        c = copy.contents
        assert (c.srcMemoryType, c.dstMemoryType, stream) == (1, 2, STREAM)  # host, device
        if (result := self.fail()) == 0:
            for row in range(c.Height):
                source = c.srcHost + row * c.srcPitch
                self.pieces.append((source, source + c.WidthInBytes))
                ctypes.memmove(c.dstDevice + row * c.dstPitch, source, c.WidthInBytes)
        return result

    def write(self, stream, address, value, flags):
        assert (stream, flags) == (STREAM, 0)
        if (result := self.fail()) == 0:
            ctypes.c_uint32.from_address(address).value = value
        return result

    def rows_of(self, layer, ids, chunk):
        """Of a chunk, by expert: the first of the hidden rows that its jobs have, and their bytes as they must be."""
        found = {}
        for *addresses, rows, j, first in self.jobs[chunk].tolist():
            if rows == 0:
                continue
            assert not any((address - self.ring.ctypes.data) % 16 for address in addresses)
            at = [address - self.ring.ctypes.data for address in addresses]
            gate, up, down = self.memory[layer][:, ids[j]]
            here = [self.ring[at[i] : at[i] + rows * ROWS].tobytes() for i in range(2)]
            begins = [b for b in range(0, F - rows + 1, 32) if gate[b * ROWS : (b + rows) * ROWS].tobytes() == here[0]]
            assert len(begins) == 1
            (begin,) = begins
            assert first == (layer * self.memory.shape[2] + ids[j]) * F + begin
            assert up[begin * ROWS : (begin + rows) * ROWS].tobytes() == here[1]
            columns = down[:DOWN].reshape(WIDTH, -1)[:, begin // 32 * 34 : (begin + rows) // 32 * 34]
            assert self.ring[at[2] : at[2] + columns.size].tobytes() == columns.tobytes()
            found[j] = begin, rows
        return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_copies_bring_the_last_hidden_rows_in_jobs_and_cross_no_border(data):
    experts = 5
    offsets = 2 * data.draw(st.lists(st.integers(0, 2 * 3 * experts * F * ROWS), max_size=12))  # each twice
    device = Device(experts, borders=offsets, seed=data.draw(st.integers(0, 99)))
    for number in (1, 2):
        layer, ids = data.draw(st.integers(0, 1)), data.draw(st.permutations(range(experts)))[:K]
        rows = data.draw(st.sampled_from([(F, F, F), (F, 32, 0), (0, F, 0), (32, 0, 0), (0, 0, 0)]))
        device.divide(ids, rows, number)
        assert device.copies.send(layer, number) == 0
        assert device.rows_of(layer, ids, 0) == {j: (F - count, count) for j, count in enumerate(rows) if count}
        assert (device.jobs == device.host_jobs).all()
        for signal in (Signal.SENT, Signal.QUEUED, Signal.DIVIDED):
            assert device.signal(signal) == number
    assert all(begin < end for begin, end in device.pieces)
    assert not any(begin < border < end for begin, end in device.pieces for border in device.borders)


def test_what_exceeds_the_memory_is_sent_in_chunks_once_the_one_before_is_used():
    """The memory holds one expert and a half; a layer with little leaves chunks without jobs, which arrive at once."""
    device = Device(5, rows=F + 32)
    chunks, ids = len(device.host_jobs), (4, 0, 2)
    assert chunks == 3
    for number, rows in enumerate([(F, F, F), (F, 32, F), (32, 32, 32), (F, 0, 0), (0, 0, 0)], 1):
        device.divide(ids, rows, number)
        found, thread = {}, threading.Thread(target=device.copies.send, args=(1, number))
        thread.start()
        for chunk in range(chunks):
            while device.signal(Signal.SENT) < number * chunks + chunk:
                pass
            found |= device.rows_of(1, ids, chunk)
            if chunk + 1 < chunks and device.jobs[chunk + 1].any():
                assert device.signal(Signal.SENT) == number * chunks + chunk  # it waits for this one
            device.signals[Signal.COMPUTED * SIGNAL_STRIDE] = number * chunks + chunk
        thread.join(10)
        assert not thread.is_alive()
        assert found == {j: (F - count, count) for j, count in enumerate(rows) if count}


def test_an_expert_larger_than_the_memory_is_cut():
    device = Device(4, rows=32)
    assert len(device.host_jobs) == 2 * K
    device.divide((1, 2, 3), (F, 32, 0))
    device.signals[Signal.COMPUTED * SIGNAL_STRIDE] = 99  # nobody uses the chunks
    assert device.copies.send(0, 1) == 0
    assert device.host_jobs[:, 0, 3].tolist() == [32, 32, 32, 0, 0, 0]
    assert device.host_jobs[:, 0, 4].tolist() == [0, 0, 1, 0, 0, 0]
    assert device.rows_of(0, (1, 2, 3), 2) == {1: (32, 32)}  # the last one is still there


def test_a_wait_for_a_chunk_ends_when_the_step_is_broken_off():
    device = Device(5, rows=F)
    device.divide((0, 1, 2), (F, F, F))
    thread = threading.Thread(target=device.copies.send, args=(0, 1))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    device.signals[Signal.STOPPED * SIGNAL_STRIDE] = 1
    thread.join(10)
    assert not thread.is_alive()


def test_another_thread_sends_a_layer_once_it_is_divided_unless_its_divider_has():
    device = Device(4)
    assert device.copies.send_when_divided(0, 1) == NOT_YET
    assert device.signal(Signal.SENDING)
    device.divide((1, 2, 3), (F, 0, 0), 1)  # leaves it to that thread
    assert device.signal(Signal.DIVIDED) == 1
    assert device.copies.send_when_divided(0, 1) == 0
    assert device.rows_of(0, (1, 2, 3), 0) == {0: (0, F)}
    device.signals[Signal.SENDING * SIGNAL_STRIDE] = 0
    for number in (2, 3):  # the caller sends two layers before that thread comes to the first
        device.divide((1, 2, 3), (F, F, 0), number)
        assert device.signal(Signal.DIVIDED) == number - 1
        assert device.copies.send(1, number) == 0
    calls = device.calls
    assert device.copies.send_when_divided(1, 2) == device.copies.send_when_divided(1, 3) == 0
    assert device.calls == calls


@pytest.mark.parametrize("fails", range(1, 9))
def test_the_first_copy_that_fails_ends_the_others_and_names_the_driver_s_error(fails):
    device = Device(4, fails=fails)
    device.divide((1, 2, 3), (F, 32, 0))
    assert device.copies.send(0, 1) == 700
    assert device.calls == fails
    assert device.signal(Signal.SENT) == 0
    with pytest.raises(ResourceError, match="driver error 700"):
        cuda_driver.check_copy(700)
    cuda_driver.check_copy(0)


@pytest.mark.parametrize(
    "jobs", [np.zeros((1, K, JOB)), np.zeros((2, K, JOB), np.int64), np.zeros((1, JOB, K), np.int64).transpose(0, 2, 1)]
)
def test_jobs_that_do_not_fit_are_errors(jobs):
    device = Device(4)
    layout = Layout(np.zeros((3, 4), np.int64), (ROWS, ROWS), (32, 34))
    with pytest.raises(ValueError, match="jobs are"):
        TokenCopies(device.division, [layout], WIDTH, (0, 0), K * F, (0, 0, 0, 0, ()), jobs, 0)

"""Copies of the experts that a GPU computes of one token, started by compiled code as soon as a layer is divided.

Knows addresses, C functions and numbers in memory; not how work is divided, nor what the C functions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numba import types

from fiddler.kernels.codegen.copy_calls import call_copy, call_write, copy, copy_columns, rows_copy_words
from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.machine.signals import SIGNAL_STRIDE, is_at, set_signal, signal, wait_for
from fiddler.kernels.one_token import NOT_YET, Signal, TokenDivision

__all__ = ["JOB", "Layout", "TokenCopies"]

JOB = 6
"""Numbers of a job: addresses of gate, up and down of some hidden rows; their number; the index of their expert id; the
index of the first one among the hidden rows of all layers' experts."""

_NO_ROOM = -(1 << 40)  # no int of a C function
_SENT, _COMPUTED, _STOPPED = int(Signal.SENT), int(Signal.COMPUTED), int(Signal.STOPPED)
_DIVIDED, _QUEUED, _SENDING = int(Signal.DIVIDED), int(Signal.QUEUED), int(Signal.SENDING)


class Layout(NamedTuple):
    """How the experts of a layer are stored."""

    matrices: np.ndarray  # int64 [3, E], addresses of gate, up and down
    row_bytes: tuple[int, int]  # of gate and up
    down_block: tuple[int, int]  # weights and bytes of a block of down


class TokenCopies:
    """Copies the hidden rows that the GPU computes, and their jobs, layer by layer; sets SENT when they are there.

    Where a layer's rows exceed the memory for them they are sent in chunks, each when COMPUTED has the number of the
    one before. With C chunks, those of layer n have the numbers n C to n C + C - 1; chunks without rows arrive at once.
    """

    def __init__(
        self,
        division: TokenDivision,
        layers: Sequence[Layout],
        width: int,
        target: tuple[int, int],
        rows: int,
        functions: tuple[int, int, int, int, Sequence[int]],
        jobs: np.ndarray,
        device_jobs: int,
    ) -> None:
        """width: stored rows of down. target: address and bytes of the memory. rows: hidden rows that it holds.

        functions: addresses of three C functions that queue work in one stream and return 0 for success, the stream,
        and, ascending, source addresses that no copy may cross. The functions, see the CUDA Driver API:
        int copy(uint64 target, void *source, size_t nbytes, void *stream); int copy_rows(CUDA_MEMCPY2D *, void
        *stream); int write(void *stream, uint64 address, uint32 value, unsigned flags), after the copies so far.
        jobs: int64 [C, K, JOB], written; unused ones are 0. device_jobs: the address that they are copied to.
        """
        k = division.gpu_rows.shape[0]
        if jobs.shape != (self.chunks(k, division.hidden, rows), k, JOB) or jobs.dtype != np.int64:
            raise ValueError(f"jobs are {jobs.dtype} {jobs.shape}; expected int64 [C, {k}, {JOB}]")
        if not jobs.flags.c_contiguous:
            raise ValueError("jobs are not contiguous")
        one, rows_of, write, stream, borders = functions
        matrices = np.ascontiguousarray([each.matrices for each in layers], np.int64)
        bytes_of = np.array([[*each.row_bytes, *each.down_block] for each in layers], np.int64)
        fixed = [division.hidden, width, *target, rows, device_jobs, one, rows_of, write, stream]
        self._arrays = (
            *(division.signals, division.expert_ids, division.gpu_rows, matrices, bytes_of),
            *(np.array(fixed, np.int64), np.array(borders, np.int64), jobs, np.zeros((len(jobs), k), np.int64)),
            rows_copy_words(),
        )
        self._call = _copies.entry()

    @staticmethod
    def chunks(k: int, hidden: int, rows: int) -> int:
        """The most chunks of the rows of k experts."""
        return k * -(-hidden // rows) if rows < hidden else -(-k // (rows // hidden))

    def send(self, layer: int, number: int) -> int:
        """Start the copies of this layer, which is divided, and set DIVIDED; 0, or the first other result of a copy."""
        return self._checked(self._call(self._arrays, layer, number, False))

    def send_when_divided(self, layer: int, number: int) -> int:
        """Start the copies as soon as DIVIDED is `number`, unless QUEUED says that its caller has; on another thread.

        Returns as `send`, or NOT_YET after some 0.5 ms in which the layer was not divided. From the first call on, as
        long as SENDING is not 0, the copies of layers that are divided are left to this function.
        """
        return self._checked(self._call(self._arrays, layer, number, True))

    @staticmethod
    def _checked(result: int) -> int:
        assert result != _NO_ROOM, "the experts exceed the memory of the copies"
        return result


@partial(kernel, parallel=False)
def _send(arrays: tuple[np.ndarray, ...], layer: int, number: int, waits: bool) -> int:
    """See `TokenCopies`."""
    signals, expert_ids, gpu_rows, matrices, bytes_of, fixed, borders, jobs, begins, rows_copy = arrays
    if waits:
        set_signal(signals, _SENDING, 1)
        if not wait_for(signals, _DIVIDED, number):
            return NOT_YET
        if is_at(signals, _QUEUED, number):
            return 0
    result: int = _make_jobs(expert_ids, gpu_rows, bytes_of[layer], fixed, layer * matrices.shape[2], jobs, begins)
    if result == 0:
        of_layer = expert_ids, matrices[layer], bytes_of[layer], fixed, borders, rows_copy
        result = _queue_copies(signals, of_layer, jobs, begins, number)
    set_signal(signals, _QUEUED, number)
    if not waits:
        set_signal(signals, _DIVIDED, number)
    return result


@partial(kernel, parallel=False)
def _make_jobs(
    expert_ids: np.ndarray,
    gpu_rows: np.ndarray,
    bytes_of: np.ndarray,
    fixed: np.ndarray,
    experts: int,
    jobs: np.ndarray,
    begins: np.ndarray,
) -> int:
    """Divide a layer's rows among chunks. Each matrix begins at a multiple of 16 bytes behind the one before.

    experts: of the layers before. begins: int64 [C, K], the first hidden row of each job.
    """
    hidden, width, begun, nbytes, room = fixed[0], fixed[1], fixed[2], fixed[3], fixed[4]
    jobs[:] = 0
    chunk, count, used, address = 0, 0, 0, begun
    for i in range(gpu_rows.shape[0]):
        j, left = gpu_rows[i, 0], gpu_rows[i, 1]
        if left == 0:
            break
        while left > 0:
            rows = min(left, room)
            if used + rows > room:
                chunk, count, used, address = chunk + 1, 0, 0, begun
            begins[chunk, count] = hidden - left
            jobs[chunk, count, 3], jobs[chunk, count, 4] = rows, j
            jobs[chunk, count, 5] = (experts + expert_ids[0, j]) * hidden + hidden - left
            for matrix in range(3):
                jobs[chunk, count, matrix] = address
                matrix_bytes = rows * bytes_of[matrix] if matrix < 2 else width * (rows // bytes_of[2] * bytes_of[3])
                address += (matrix_bytes + 15) // 16 * 16
            if address > begun + nbytes:
                return _NO_ROOM
            left, used, count = left - rows, used + rows, count + 1
    return 0


@partial(kernel, parallel=False)
def _queue_copies(
    signals: np.ndarray, of_layer: tuple[np.ndarray, ...], jobs: np.ndarray, begins: np.ndarray, number: int
) -> int:
    """Call the C functions for each chunk's rows and signal, and for all jobs behind the rows of the first chunk.

    A large copy begins some 7 us later behind a small one than behind a large one.
    """
    expert_ids, matrices, bytes_of, fixed, borders, rows_copy = of_layer
    function, write, stream, chunks = fixed[6], fixed[8], fixed[9], jobs.shape[0]
    sent = signals.ctypes.data + 4 * SIGNAL_STRIDE * _SENT
    result: int = 0
    for chunk in range(chunks):
        if result != 0:
            return result
        if chunk > 0 and jobs[chunk, 0, 3] > 0:
            while not wait_for(signals, _COMPUTED, number * chunks + chunk - 1):
                if signal(signals, _STOPPED) != 0:
                    return 0
        for i in range(jobs.shape[1]):
            if jobs[chunk, i, 3] == 0 or result != 0:
                break
            expert = expert_ids[0, jobs[chunk, i, 4]]
            result = _copy_part(
                matrices[:, expert], bytes_of, fixed, borders, jobs[chunk, i], begins[chunk, i], rows_copy
            )
        if result == 0 and chunk == 0:
            result = call_copy(function, fixed[5], jobs.ctypes.data, jobs.nbytes, stream)
        if result == 0:
            result = call_write(write, stream, sent, number * chunks + chunk)
    return result


@partial(kernel, parallel=False)
def _copy_part(
    matrices: np.ndarray,
    bytes_of: np.ndarray,
    fixed: np.ndarray,
    borders: np.ndarray,
    job: np.ndarray,
    begin: int,
    rows_copy: np.ndarray,
) -> int:
    """Copy hidden rows of one expert: rows of gate and up, columns of down."""
    hidden, width, function, stream, rows = fixed[0], fixed[1], fixed[6], fixed[9], job[3]
    for matrix in range(2):
        nbytes = rows * bytes_of[matrix]
        source = matrices[matrix] + begin * bytes_of[matrix]
        result: int = copy(function, job[matrix], source, nbytes, stream, borders)
        if result != 0:
            return result
    source = matrices[2] + begin // bytes_of[2] * bytes_of[3]
    row_bytes, pitch = rows // bytes_of[2] * bytes_of[3], hidden // bytes_of[2] * bytes_of[3]
    if rows == hidden:
        return int(copy(function, job[2], source, width * row_bytes, stream, borders))
    functions = function, fixed[7], stream
    return int(copy_columns(functions, job[2], source, row_bytes, width, pitch, borders, rows_copy))


_INTS, _MATRIX, _CUBE = types.int64[::1], types.int64[:, ::1], types.int64[:, :, ::1]
_ARRAYS = types.Tuple(
    (types.uint32[::1], _MATRIX, _MATRIX, _CUBE, _MATRIX, _INTS, _INTS, _CUBE, _MATRIX, _INTS),
)
_copies = FunctionPointer(_send, _ARRAYS, types.int64, types.int64, types.boolean, returns=types.int64)

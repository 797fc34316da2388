"""One token's missing experts: which rows each side computes, by a table of plans, and copies of the GPU's part.

Knows arrays, addresses and a C function; not how plans are made, nor where the copies go. Both are calls of a few
microseconds: beside the CPU's products, which evict it from the caches, Python takes several times as long as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import kernel

__all__ = ["JOB", "PartCopies", "TokenDivision"]

JOB = 5
"""Numbers of a job: addresses of gate, up and down of some hidden rows; their number; the index of their expert id."""


class TokenDivision:
    """Divides the missing experts of one token; its arrays hold the result until the next call."""

    def __init__(self, chosen: np.ndarray, experts: int, hidden: int) -> None:
        """chosen: float32 [1, K], distinct expert ids, read by each call. hidden: rows of an expert."""
        if chosen.ndim != 2 or len(chosen) != 1 or chosen.dtype != np.float32 or not chosen.flags.c_contiguous:
            raise ValueError(f"chosen is {chosen.dtype} {chosen.shape}; expected contiguous float32 [1, K]")
        k = chosen.shape[1]
        self._chosen, self._experts, self._k, self.hidden = chosen, experts, k, hidden
        self.expert_ids = np.zeros((1, k), np.int64)
        self.cpu_rows = np.zeros(experts, np.int64)
        """int64 [E], hidden rows of each expert that the CPU computes, from the first on."""
        self.gpu_rows = np.zeros((k, 2), np.int64)
        """int64 [K, 2]: the index of an expert id, and its last hidden rows that the GPU computes, 0 at the end."""

    def plans(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """A table for `of_layer`: rows[n]: the GPU's hidden rows of each of n missing experts, for n from 0 to K."""
        table = np.zeros((self._k + 1, self._k), np.int64)
        if [len(each) for each in rows] != list(range(self._k + 1)):
            raise ValueError(f"plans for {[len(each) for each in rows]} missing experts; expected 0 to {self._k}")
        for missing, each in enumerate(rows):
            if any(not 0 <= count <= self.hidden for count in each):
                raise ValueError(f"the GPU's rows {each} lie outside 0..{self.hidden}")
            table[missing, :missing] = each
        return table

    def of_layer(self, missing: np.ndarray, counts: np.ndarray) -> Callable[[np.ndarray], int]:
        """A function that divides the missing experts of `chosen` by a table of `plans`; returns their number.

        missing: bool [E], of a layer, read by each call. counts: int64 [E], which it increases for each chosen expert.
        The function raises ValueError where an expert id is out of range.
        """
        for name, array, dtype in (("missing", missing, np.bool_), ("counts", counts, np.int64)):
            if array.shape != (self._experts,) or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; expected contiguous [{self._experts}]")
        arrays = self._chosen, missing, self.expert_ids, self.cpu_rows, self.gpu_rows, counts
        call, chosen, hidden = _division.entry(), self._chosen, self.hidden

        def divide(plans: np.ndarray) -> int:
            count: int = call(*arrays, hidden, plans)
            if count < 0:
                raise ValueError(f"an expert id of {chosen[0].tolist()} lies outside 0..{len(missing) - 1}")
            return count

        return divide


@partial(kernel, parallel=False)
def _divide(
    chosen: np.ndarray,
    missing: np.ndarray,
    expert_ids: np.ndarray,
    cpu_rows: np.ndarray,
    gpu_rows: np.ndarray,
    counts: np.ndarray,
    hidden: int,
    plans: np.ndarray,
) -> int:
    """See `TokenDivision`. Returns -1, with all as before, where an expert id is out of range."""
    count, streamed = 0, 0
    for j in range(chosen.shape[1]):
        if not 0 <= chosen[0, j] < missing.size:
            return -1
    for j in range(chosen.shape[1]):
        cpu_rows[expert_ids[0, j]] = 0
    for j in range(chosen.shape[1]):
        expert = np.int64(chosen[0, j])
        expert_ids[0, j] = expert
        counts[expert] += 1
        count += missing[expert]
    i = 0
    for j in range(chosen.shape[1]):
        gpu_rows[j, 1] = 0
        if missing[expert_ids[0, j]]:
            rows = plans[count, i]
            cpu_rows[expert_ids[0, j]] = hidden - rows
            if rows > 0:
                gpu_rows[streamed, 0], gpu_rows[streamed, 1] = j, rows
                streamed += 1
            i += 1
    return count


class PartCopies:
    """Copies the hidden rows that the GPU computes of one layer's experts, one after the other, as jobs for it."""

    def __init__(
        self,
        division: TokenDivision,
        matrices: np.ndarray,
        row_bytes: tuple[int, int],
        down_block: tuple[int, int],
        width: int,
        target: tuple[int, int],
        copy: tuple[int, int, Sequence[int]],
        jobs: np.ndarray,
    ) -> None:
        """matrices: int64 [3, E], addresses of gate, up and down. row_bytes: of gate and up.

        down_block: weights and bytes of a block of down, of which `width` rows are stored. target: address and bytes.
        copy: the address of a C function that starts a copy of contiguous bytes and returns 0 for success, int
        function(uint64 target, void *source, size_t nbytes, void *stream); its stream; and, ascending, source addresses
        that no copy may cross. jobs: int64 [K, JOB], written; unused ones are 0.
        """
        k = division.gpu_rows.shape[0]
        if jobs.shape != (k, JOB) or jobs.dtype != np.int64 or not jobs.flags.c_contiguous:
            raise ValueError(f"jobs are {jobs.dtype} {jobs.shape}; expected contiguous int64 {k, JOB}")
        address, stream, borders = copy
        layout = np.array([division.hidden, *row_bytes, *down_block, width, *target, address, stream], np.int64)
        self._arguments = (
            *(division.expert_ids, division.gpu_rows, np.ascontiguousarray(matrices, np.int64), layout),
            *(np.array(borders, np.int64), jobs),
        )
        self._call = _copies.entry()

    def columns(self, part: int) -> tuple[int, int, int, int]:
        """The copy that a call leaves out, of the columns of down of the part with this index, which are apart.

        Target address, source address, bytes of each of `width` rows, and from one to the next in the source.
        """
        expert_ids, gpu_rows, matrices, layout, _, jobs = self._arguments
        hidden, block_length, block_bytes = int(layout[0]), int(layout[3]), int(layout[4])
        row_bytes, pitch = (count // block_length * block_bytes for count in (int(gpu_rows[part, 1]), hidden))
        source = int(matrices[2, expert_ids[0, gpu_rows[part, 0]]]) + pitch - row_bytes
        return int(jobs[part, 2]), source, row_bytes, pitch

    def __call__(self) -> int:
        """Start the copies of the last division, but for columns of down of a part of an expert: see `columns`.

        The result is that of the first copy that failed, or 0.
        """
        result: int = self._call(*self._arguments)
        assert result != _NO_ROOM, "the experts exceed the memory of the copies"
        return result


_NO_ROOM = -(1 << 40)  # no int of a C function


@partial(kernel, parallel=False)
def _copy_parts(
    expert_ids: np.ndarray,
    gpu_rows: np.ndarray,
    matrices: np.ndarray,
    layout: np.ndarray,
    borders: np.ndarray,
    jobs: np.ndarray,
) -> int:
    """See `PartCopies`. Each matrix begins at a multiple of 16 bytes behind the one before."""
    hidden, block_length, block_bytes, width = layout[0], layout[3], layout[4], layout[5]
    address, end, function, stream = layout[6], layout[6] + layout[7], layout[8], layout[9]
    jobs[:] = 0
    for i in range(gpu_rows.shape[0]):
        j, rows = gpu_rows[i, 0], gpu_rows[i, 1]
        if rows == 0:
            break
        expert = expert_ids[0, j]
        jobs[i, 3], jobs[i, 4] = rows, j
        for matrix in range(3):
            source = matrices[matrix, expert]
            if matrix < 2:
                nbytes = rows * layout[1 + matrix]
                source += (hidden - rows) * layout[1 + matrix]
            else:
                nbytes = width * (rows // block_length * block_bytes)
            if address + nbytes > end:
                return _NO_ROOM
            jobs[i, matrix] = address
            if matrix < 2 or rows == hidden:
                result: int = _copy(function, address, source, nbytes, stream, borders)
                if result != 0:
                    return result
            address += (nbytes + 15) // 16 * 16
    return 0


@partial(kernel, parallel=False)
def _copy(function: int, target: int, source: int, nbytes: int, stream: int, borders: np.ndarray) -> int:
    """Call the copy function for contiguous bytes, in pieces that cross no border."""
    end = source + nbytes
    while source < end:
        index, piece_end = np.searchsorted(borders, source, "right"), end
        if index < borders.size:
            piece_end = min(end, borders[index])
        result: int = _call_c(function, target, source, piece_end - source, stream)
        if result != 0:
            return result
        target, source = target + piece_end - source, piece_end
    return 0


@intrinsic
def _call_c(_context: Any, _function: Any, _target: Any, _source: Any, _nbytes: Any, _stream: Any) -> Any:
    """function(target, source, nbytes, stream) -> int32 as int64, by C's calling convention."""
    word, number = ir.IntType(64), ir.IntType(32)

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(number, [word] * 4)
        return b.sext(b.call(b.inttoptr(arguments[0], kind.as_pointer()), arguments[1:]), word)

    return types.int64(*[types.int64] * 5), generate


_IDS = types.int64[:, ::1]
_division = FunctionPointer(
    _divide,
    *(types.float32[:, ::1], types.boolean[::1], _IDS, types.int64[::1], _IDS, types.int64[::1], types.int64, _IDS),
    returns=types.int64,
)
_copies = FunctionPointer(
    _copy_parts, *(_IDS, _IDS, _IDS, types.int64[::1], types.int64[::1], _IDS), returns=types.int64
)

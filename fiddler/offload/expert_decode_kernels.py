"""Decodes quantised experts on a GPU into 16-bit ones, whose products are faster where an expert has many tokens.

Knows addresses and decoders. `grouped_block_kernels` decodes into tiles instead, for each tile of tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.kernels.formats.block_format import GROUP
from fiddler.kernels.formats.triton_decoders import DECODERS
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.offload.feed_forward import Job

__all__ = ["WEIGHT_TYPES", "Part", "decoded", "parts_in"]

_ROWS, _GROUPS, _WARPS = 4, 64, 4  # what a program decodes: rows, and groups of 32 weights of each
WEIGHT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Part(NamedTuple):
    """Some hidden rows of a job, whose addresses are those of the first of them."""

    job: Job
    all_rows: int  # hidden rows of the whole job: columns of its `down`


@triton.jit
def _decode_matrices(
    matrices, DECODE: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    """Decode the matrices of a list [n, 6]: address, bytes from row to row, rows, groups of one, where to, 0."""
    matrix = matrices + 6 * tl.program_id(2)
    rows, groups = tl.load(matrix + 2).to(tl.int32), tl.load(matrix + 3).to(tl.int32)
    if (tl.program_id(0) * R < rows) & (tl.program_id(1) * G < groups):
        source = tl.multiple_of(tl.load(matrix).to(tl.pointer_type(tl.uint8)), ALIGNED)
        target = tl.multiple_of(tl.load(matrix + 4).to(tl.pointer_type(W)), 16)
        row_bytes = tl.multiple_of(tl.load(matrix + 1), ALIGNED)
        r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
        group = (tl.program_id(1) * G + tl.arange(0, G))[None, :]
        lane = tl.arange(0, 32)
        inside = (r < rows) & (group < groups)
        values = DECODE(source + r * row_bytes, group, lane, inside)
        at = target + ((r.to(tl.int64) * groups + group) * 32)[:, :, None] + lane[None, None, :]
        tl.store(at, values.to(W), mask=inside[:, :, None])


def parts_in(jobs: Sequence[Job], rows: int, weights: ExpertWeights) -> Iterator[list[Part]]:
    """The jobs in order, so many at once as have at most `rows` hidden rows together.

    One that has more is divided into parts of whole blocks, each of them alone, so that the sums of a token's parts are
    added in the same order each time.
    """
    width = weights.shape[2]
    of_gate, of_up, of_down = weights.matrix_formats
    block, block_bytes = of_down.block_length, of_down.block_bytes
    assert rows >= block, "there is memory for a block of hidden rows"
    some: list[Part] = []
    left = rows
    for job in jobs:
        if some and job.rows > left:
            yield some
            some, left = [], rows
        if job.rows <= left:
            some.append(Part(job, job.rows))
            left -= job.rows
            continue
        count = -(-job.rows // (rows // block * block))
        step = -(-job.rows // (count * block)) * block
        gate, up, down = job.addresses
        for begin in range(0, job.rows, step):
            at = gate + begin * of_gate.row_bytes(width), up + begin * of_up.row_bytes(width)
            addresses = *at, down + begin // block * block_bytes
            part = Job(addresses, min(step, job.rows - begin), job.first, job.end, job.biases + begin)
            yield [Part(part, job.rows)]
    if some:
        yield some


def decoded(
    parts: Sequence[Part],
    weights: ExpertWeights,
    memory: Tensor,
    to_device: Callable[[list[int], torch.device], Tensor],
) -> list[Job]:
    """The parts' jobs with addresses in `memory` [at least 3 * sum of their rows * D], into which they are decoded.

    memory: bfloat16 or float16, beginning at a multiple of 16 bytes. to_device: copies a list of numbers to the GPU.
    """
    width, formats = weights.shape[2], weights.matrix_formats
    matrices: dict[WeightFormat, list[tuple[int, ...]]] = {each: [] for each in formats}
    jobs, target = [], memory.data_ptr()
    for job, all_rows in parts:
        addresses = []
        for address, stored, is_down in zip(job.addresses, formats, (False, False, True), strict=True):
            rows, columns = (width, job.rows) if is_down else (job.rows, width)
            row_bytes = stored.row_bytes(all_rows if is_down else width)
            matrices[stored].append((address, row_bytes, rows, columns // GROUP, target, 0))
            addresses.append(target)
            target += rows * columns * memory.element_size()
        jobs.append(job._replace(addresses=(addresses[0], addresses[1], addresses[2])))
    numbers = to_device([number for some in matrices.values() for matrix in some for number in matrix], memory.device)
    for stored, some in matrices.items():
        groups = max(matrix[3] for matrix in some)
        g = min(_GROUPS, triton.next_power_of_2(groups))
        r = _GROUPS * _ROWS // g
        _decode_matrices[(triton.cdiv(max(matrix[2] for matrix in some), r), triton.cdiv(groups, g), len(some))](
            numbers,
            DECODE=DECODERS[stored.name],
            ALIGNED=gcd(stored.block_bytes, 16),
            W=WEIGHT_TYPES[memory.dtype],
            R=r,
            G=g,
            num_warps=_WARPS,
        )
        numbers = numbers[6 * len(some) :]
    return jobs

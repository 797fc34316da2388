"""How activations lie in memory between the products, and gathering them into that.

Activations are kept in one of two layouts, counted in 4-byte words:
*rows*, for few tokens: one after another, in bf16 where weights are bf16 and activations rounded to it, else float32;
*packed*: panels of tokens, one after another; a panel is words [its tokens' width, its tokens]. Entry (p, t) is the
bf16 elements 2p and 2p + 1 of token t where the CPU multiplies pairs, else its element p in float32. The last panel may
be narrower; tokens are padded to a multiple of 16.

All of it is compiled: between two products of one token, Python would find its code and data evicted by the weights.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numba import njit, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    amx,
    bf16_pairs,
    constant_of,
    k_blocked,
    panel_tokens,
    row_bytes,
)
from fiddler.kernels.matmul.stores import store_activation, store_pair, store_word

__all__ = ["GROUPS", "Groups", "call_pack", "group_tokens", "pack", "places", "row_stride"]

# tokens of an expert in all: more are faster packed (24 pairs are not, by a third; from 25 to 28 it is an estimate)
_FEW_FLOATS, _FEW_PAIRS, _FEW_IN_PARTS = 24, 28, 14
_in_rows_beside = constant_of(lambda variant: 8 if variant.tier.lanes == 16 else 12, types.intp)
"""Tokens beside packed ones."""
_FEW_FOR_TILES, _BESIDE = 2, 32  # likewise with tile registers; and from how many packed ones on, beside them
_LINE, _SETS = 64, 64  # bytes and sets of the first-level caches of Zen and Xeon
_SPREAD = 39  # lines from row to row, of the number of sets: 0.618 of it, which spreads any number of rows well


class Groups(NamedTuple):
    """Tokens that meet the same expert's weights in one layout: group g is `token[first[g] : first[g + 1]]`.

    An expert may have two groups, one after the other: whole vectors of tokens packed, and the few that remain.
    """

    expert: np.ndarray  # int64 [G]
    first: np.ndarray  # int64 [G + 1]
    packed: np.ndarray  # bool [G]
    hidden: np.ndarray  # int64 [G]: the hidden rows of the expert that are computed, from the first on
    token: np.ndarray  # int64 [A]
    routing_weights: np.ndarray  # float32 [A]: how much of the expert's output the token gets


@njit(**OPTIONS)
def group_tokens(
    variant: KernelVariant, expert_ids: np.ndarray, routing_weights: np.ndarray, hidden: np.ndarray, even: bool
) -> Groups:
    """Groups of the tokens with these experts, int64 [T, K] and float32 [T, K].

    `hidden`: int64 [E], how many hidden rows of each expert are computed; one with none has no group. `even`: whether
    every width that is multiplied is even, which pairs need to be packed.
    """
    tokens, each = expert_ids.shape
    begin = np.zeros(hidden.size + 1, np.int64)  # of an expert's assignments; at first how many it has, one further
    for t in range(tokens):
        for j in range(each):
            if hidden[expert_ids[t, j]] > 0:
                begin[expert_ids[t, j] + 1] += 1
    groups = 0
    for e in range(hidden.size):
        groups += 2 * (begin[e + 1] > 0)
        begin[e + 1] += begin[e]
    expert, first = np.empty(groups, np.int64), np.zeros(groups + 1, np.int64)
    packed, rows = np.empty(groups, np.bool_), np.empty(groups, np.int64)
    token, grouped_weights = np.empty(begin[-1], np.int64), np.empty(begin[-1], np.float32)
    g = 0
    for e in range(hidden.size):
        count = begin[e + 1] - begin[e]
        rest = _rest(variant, count, even)
        for part in range(2):
            size = rest if part else count - rest
            if size > 0:
                expert[g], packed[g], rows[g], first[g + 1] = e, part == 0, hidden[e], first[g] + size
                g += 1
    for t in range(tokens):
        for j in range(each):
            e = expert_ids[t, j]
            if hidden[e] > 0:
                token[begin[e]], grouped_weights[begin[e]] = t, routing_weights[t, j]
                begin[e] += 1
    return Groups(expert[:g], first[: g + 1], packed[:g], rows[:g], token, grouped_weights)


@njit(**OPTIONS)
def _rest(variant: KernelVariant, count: int, even: bool) -> int:
    """How many of an expert's tokens lie in rows: those that packing would pad too much, or all."""
    if bf16_pairs(variant) and not even:
        return count
    few = _FEW_IN_PARTS if k_blocked(variant) else _FEW_PAIRS if bf16_pairs(variant) else _FEW_FLOATS
    if count <= few and not amx(variant):
        return count
    most = _in_rows_beside(variant)
    if amx(variant):
        if _FEW_FOR_TILES < count <= _BESIDE:
            return 0
        most = _FEW_FOR_TILES
    return count % 16 if count % 16 <= most else 0


@njit(**OPTIONS)
def row_stride(variant: KernelVariant, width: int) -> int:
    """Elements from one token to the next in the rows layout.

    So many more than the width that parts of many rows, the same of each, lie all over the first-level cache: rows a
    large power of two apart would share a few of its places.
    """
    size: int = row_bytes(variant)
    lines = (width * size + _LINE - 1) // _LINE
    return (lines + (_SPREAD - lines) % _SETS) * _LINE // size


@njit(**OPTIONS)
def places(variant: KernelVariant, groups: Groups, width: int, begin: int) -> np.ndarray:
    """At which word each group's activations of `width` elements a token begin, from `begin` on, and the end: [G + 1].

    Every group begins at a cache line where `begin` is one.
    """
    stride = row_stride(variant, width)
    in_rows = stride * row_bytes(variant) // 4
    in_panels = in_rows if bf16_pairs(variant) else width
    at = np.empty(groups.expert.size + 1, np.int64)
    at[0] = begin
    for g in range(groups.expert.size):
        count = groups.first[g + 1] - groups.first[g]
        words = (count + 15) // 16 * 16 * in_panels if groups.packed[g] else count * in_rows
        at[g + 1] = at[g] + (words + 15) // 16 * 16
    return at


@partial(kernel, parallel=False)
def _pack(
    variant: KernelVariant, x: np.ndarray, groups: Groups, words: int, at: np.ndarray, thread: int, threads: int
) -> None:
    """Gather a thread's share of the columns of x [T, K] float32, group by group, each group in its layout.

    `words`: an address, from which `at` counts words.
    """
    first, token = groups.first, groups.token
    width = x.shape[1]
    panel_width, stride, blocks = panel_tokens(variant), row_stride(variant, width), (width + 15) // 16
    begin, end = thread * blocks // threads * 16, min((thread + 1) * blocks // threads * 16, width)
    for g in range(first.size - 1):
        count = first[g + 1] - first[g]
        start = words + 4 * at[g]
        if not groups.packed[g]:
            for m in range(count):
                source = token[first[g] + m]
                for i in range(begin, end):
                    store_activation(variant, start, m * stride + i, x[source, i])
            continue
        padded = (count + 15) // 16 * 16
        row = width // 2 if bf16_pairs(variant) else width
        for panel in range(0, padded, panel_width):
            wide = min(panel_width, padded - panel)
            for m in range(panel, panel + wide):
                word = panel * row + m - panel
                source = token[first[g] + min(m, count - 1)]  # what pads is computed and never read
                if bf16_pairs(variant):
                    for p in range(begin // 2, end // 2):
                        store_pair(start, word + p * wide, x[source, 2 * p], x[source, 2 * p + 1])
                else:
                    for p in range(begin, end):
                        store_word(variant, start, word + p * wide, x[source, p])


_INTS = types.int64[::1]
GROUPS = types.NamedTuple([_INTS, _INTS, types.boolean[::1], _INTS, _INTS, types.float32[::1]], Groups)
"""Numba's type of `Groups`."""
pack = FunctionPointer(_pack, None, types.float32[:, ::1], GROUPS, types.intp, _INTS, types.intp, types.intp)
call_pack = pack.call

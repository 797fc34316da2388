"""Packing: the memory layouts of activations between the products, and gathering tokens into them. Knows no weights.

Two layouts, counted in words of 4 bytes:
*rows*, for few tokens: token after token, in bf16 where weights are bf16 and activations rounded to it, as int8 with
scales (`int8_activations`) where weights are quantised and activations rounded so, else float32;
*packed*: panel after panel of tokens; a panel is words [elements or pairs of a token, tokens]. Entry (p, t) is the bf16
elements 2p and 2p + 1 of token t where the CPU multiplies bf16 pairs, else its element p in float32; groups of int8 are
described in `int8_activations`. The last panel may have fewer tokens; tokens are padded to a multiple of 16.

All of it is compiled: the weights evict Python's code and data from the caches between two products of one token.
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
    activation_bytes,
    amx,
    bf16_pairs,
    constant_of,
    int8_packed,
    int8_rows,
    k_blocked,
    panel_tokens,
    tuned,
)
from fiddler.kernels.matmul.int8_activations import GROUP_WORDS, int8_row_bytes, store_int8, store_int8_packed
from fiddler.kernels.matmul.stores import store_activation, store_pair, store_word

__all__ = ["GROUPS", "Groups", "call_pack", "group_offsets", "group_tokens", "pack", "packed_words", "row_stride"]

_LINE, _SETS = 64, 64  # line size [bytes] and sets of the first-level caches of Zen and Xeon
_float_row_tokens, _pair_row_tokens = tuned("float_row_tokens"), tuned("pair_row_tokens")
_k_blocked_row_tokens, _amx_row_tokens = tuned("k_blocked_row_tokens"), tuned("amx_row_tokens")
_int8_row_tokens, _int8_remainder_tokens = tuned("int8_row_tokens"), tuned("int8_remainder_tokens")
_amx_packed_tokens, _row_spread_lines = tuned("amx_packed_tokens"), tuned("row_spread_lines")
_remainder_tokens = constant_of(
    lambda variant: (
        variant.tuning.remainder_tokens if variant.tier.lanes == 16 else variant.tuning.remainder_tokens_8_lanes
    ),
    types.intp,
)


class Groups(NamedTuple):
    """Groups of tokens with the same expert and layout: group g is `token[first[g] : first[g + 1]]`; A assignments.

    An expert may have two groups, one after the other: full vectors of tokens, packed, and the remainder, in rows.
    """

    expert: np.ndarray  # int64 [G]
    first: np.ndarray  # int64 [G + 1]
    packed: np.ndarray  # bool [G]
    hidden: np.ndarray  # int64 [G]: the hidden rows of the expert that are computed, from the first on
    token: np.ndarray  # int64 [A]
    routing_weights: np.ndarray  # float32 [A]


@njit(**OPTIONS)
def group_tokens(
    variant: KernelVariant, expert_ids: np.ndarray, routing_weights: np.ndarray, hidden: np.ndarray, even: bool
) -> Groups:
    """Group the tokens by expert; expert_ids: int64 [T, K], routing_weights: float32 [T, K].

    `hidden`: int64 [E], how many hidden rows of each expert are computed; an expert with none has no group. `even`:
    whether the inner dimension of every product is even, as packed bf16 pairs require.
    """
    tokens, experts_used = expert_ids.shape
    begin = np.zeros(hidden.size + 1, np.int64)  # each expert's first assignment; at first the counts, shifted by one
    for t in range(tokens):
        for j in range(experts_used):
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
        remainder = _row_tokens(variant, count, even)
        for part in range(2):
            size = remainder if part else count - remainder
            if size > 0:
                expert[g], packed[g], rows[g], first[g + 1] = e, part == 0, hidden[e], first[g] + size
                g += 1
    for t in range(tokens):
        for j in range(experts_used):
            e = expert_ids[t, j]
            if hidden[e] > 0:
                token[begin[e]], grouped_weights[begin[e]] = t, routing_weights[t, j]
                begin[e] += 1
    return Groups(expert[:g], first[: g + 1], packed[:g], rows[:g], token, grouped_weights)


@njit(**OPTIONS)
def _row_tokens(variant: KernelVariant, count: int, even: bool) -> int:
    """How many of an expert's tokens stay in rows: those that packing would pad too much, or all."""
    if bf16_pairs(variant) and not even:
        return count
    few = _float_row_tokens(variant)
    if int8_rows(variant):
        few = _int8_row_tokens(variant)
        if count <= few:
            return count
        few = _int8_remainder_tokens(variant) if int8_packed(variant) else few
        return count % 16 if count % 16 <= few else 0
    if k_blocked(variant):
        few = _k_blocked_row_tokens(variant)
    elif bf16_pairs(variant):
        few = _pair_row_tokens(variant)
    if count <= few and not amx(variant):
        return count
    max_remainder = _remainder_tokens(variant)
    if amx(variant):
        if _amx_row_tokens(variant) < count <= _amx_packed_tokens(variant):
            return 0
        max_remainder = _amx_row_tokens(variant)
    return count % 16 if count % 16 <= max_remainder else 0


@njit(**OPTIONS)
def row_stride(variant: KernelVariant, width: int) -> int:
    """Elements from one token to the next in the rows layout.

    Padded, so that the same block of many rows spreads over the whole first-level cache: rows a large power of two
    apart would compete for a few of its sets.
    """
    size: int = activation_bytes(variant)
    elements = int8_row_bytes(width) if int8_rows(variant) else width
    lines = (elements * size + _LINE - 1) // _LINE
    spread: int = (_row_spread_lines(variant) - lines) % _SETS
    return (lines + spread) * _LINE // size


@njit(**OPTIONS)
def packed_words(variant: KernelVariant, width: int) -> int:
    """Words of a token's `width` activations in the packed layout."""
    if int8_packed(variant):
        return width // 32 * GROUP_WORDS
    return width // 2 if bf16_pairs(variant) else width


@njit(**OPTIONS)
def group_offsets(variant: KernelVariant, groups: Groups, width: int, begin: int) -> np.ndarray:
    """Offset of each group's activations of `width` elements a token, from `begin` on, and the end [words]: [G + 1].

    Every group begins at a cache line if `begin` does.
    """
    stride = row_stride(variant, width)
    in_rows = stride * activation_bytes(variant) // 4
    in_panels = max(in_rows, packed_words(variant, width + 1)) if bf16_pairs(variant) else packed_words(variant, width)
    offsets = np.empty(groups.expert.size + 1, np.int64)
    offsets[0] = begin
    for g in range(groups.expert.size):
        count = groups.first[g + 1] - groups.first[g]
        words = (count + 15) // 16 * 16 * in_panels if groups.packed[g] else count * in_rows
        offsets[g + 1] = offsets[g] + (words + 15) // 16 * 16
    return offsets


@partial(kernel, parallel=False)
def _pack(
    variant: KernelVariant, x: np.ndarray, groups: Groups, words: int, offsets: np.ndarray, thread: int, threads: int
) -> None:
    """Gather a thread's block of the columns of x [T, K] float32, group by group, each group in its layout.

    `words`: the address from which `offsets` counts words.
    """
    first, token = groups.first, groups.token
    width = x.shape[1]
    panel_width, stride, blocks = panel_tokens(variant), row_stride(variant, width), (width + 31) // 32
    begin, end = thread * blocks // threads * 32, min((thread + 1) * blocks // threads * 32, width)
    for g in range(first.size - 1):
        count = first[g + 1] - first[g]
        start = words + 4 * offsets[g]
        if not groups.packed[g]:
            for m in range(count):
                source = token[first[g] + m]
                if int8_rows(variant):
                    for i in range(begin, end, 32):
                        store_int8(start + m * stride, width, i, x.ctypes.data + 4 * (source * width + i))
                else:
                    for i in range(begin, end):
                        store_activation(variant, start, m * stride + i, x[source, i])
            continue
        padded = (count + 15) // 16 * 16
        row = packed_words(variant, width)
        for panel in range(0, padded, panel_width):
            wide = min(panel_width, padded - panel)
            for m in range(panel, panel + wide):
                word = panel * row + m - panel
                source = token[first[g] + min(m, count - 1)]  # padding is computed and never read
                if int8_packed(variant):
                    for i in range(begin, end, 32):
                        group = start + 4 * (word + i // 32 * GROUP_WORDS * wide)
                        store_int8_packed(group, wide, x.ctypes.data + 4 * (source * width + i))
                elif bf16_pairs(variant):
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

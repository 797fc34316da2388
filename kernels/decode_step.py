"""One step of single tokens through a whole model: the compiled call that `CompiledDecodeStep` validates for.

Between two products of a token, Python would find its code and data evicted by the weights: a millisecond a layer of
Mixtral's shape. Every kernel that is called here is one that others call, too, so the results are theirs, bit by bit.
Knows the order of operations, which `models` describes; not files or tensors.
"""

from __future__ import annotations

from functools import lru_cache, partial
from time import CLOCK_MONOTONIC
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, typeof, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from fiddler.kernels import attention, norm_router
from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.matmul import grouped

__all__ = ["SPANS", "addresses", "compile_decode", "decode"]

SPANS = 3
"""Timed parts of each layer: query, key and value; attention's output; experts."""

_call_norm, _call_router = norm_router.normalise.call, norm_router.router.call
_call_attention, _call_products = attention.attention.call, grouped.products.call


def compile_decode(variant: KernelVariant, kept: type[np.generic]) -> None:
    """Compile `CompiledDecodeStep.step` for keys and values of this type, or read it from the cache; nothing is computed."""
    none, row = np.empty((0, 2), np.float32), np.ones(2, np.float32)
    numbers = np.empty(0, np.int64)
    weights = none, none, none[None], numbers.reshape(0, 7), row, numbers
    lacks = decode(
        variant,
        (0,) * 8,
        none,
        *weights,
        (np.ones(3, np.int64),) * 8,
        numbers.reshape(0, 2, 1),
        numbers,
        np.empty(0, kept),
        numbers,
        0,
        row,
        np.float32(0),
        1,
        grouped.workspace.words,
        none,
        none.reshape(-1),
        numbers.reshape(0, 0, 1),
        np.empty((1, 2)),
    )
    assert lacks == 0


@lru_cache(maxsize=64)
def addresses(variant: KernelVariant, kept: np.dtype) -> tuple[int, ...]:
    """The addresses of what `decode` calls; compiled, or read from the cache, where that is not done."""
    return (
        norm_router.normalise.address(),
        norm_router.router.address(),
        attention.attention.address(from_dtype(kept)[::1]),
        attention.addresses(kept),
        grouped.products.address(typeof(variant)),
        *grouped.addresses(variant),
    )


@intrinsic
def _now(_context: Any) -> Any:
    """Seconds of CLOCK_MONOTONIC."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, _arguments: list[ir.Value]) -> ir.Value:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), word.as_pointer()])
        read = cgutils.get_or_insert_function(b.module, kind, "clock_gettime")
        time = cgutils.alloca_once(b, word, 2)
        b.call(read, [ir.Constant(ir.IntType(32), CLOCK_MONOTONIC), time])
        seconds, nanoseconds = (
            b.sitofp(b.load(b.gep(time, [ir.Constant(ir.IntType(32), i)])), ir.DoubleType()) for i in range(2)
        )
        return b.fadd(seconds, b.fmul(nanoseconds, ir.Constant(ir.DoubleType(), 1e-9)))

    return types.float64(), generate


@njit(**OPTIONS)
def _timed_products(
    given: tuple[Any, ...], addresses: tuple[int, ...], memory: np.ndarray, threads: int, span: np.ndarray
) -> int:
    """`grouped_products` of what is given, and when it began and ended."""
    span[0] = _now()
    lacks: int = _call_products(addresses[4], (*given, memory, threads, addresses[5:]))
    span[1] = _now()
    return lacks


@partial(kernel, parallel=False)
def decode(
    variant: KernelVariant,
    addresses: tuple[int, ...],
    x: np.ndarray,
    attn_norm: np.ndarray,
    ffn_norm: np.ndarray,
    ffn_gate_inp: np.ndarray,
    matrices: np.ndarray,
    output_norm: np.ndarray,
    output: np.ndarray,
    shapes: tuple[np.ndarray, ...],
    places: np.ndarray,
    capacities: np.ndarray,
    kind: np.ndarray,
    positions: np.ndarray,
    window: int,
    frequencies: np.ndarray,
    epsilon: np.float32,
    threads: int,
    memory: np.ndarray,
    h: np.ndarray,
    logits: np.ndarray,
    chosen: np.ndarray,
    spans: np.ndarray,
) -> int:
    """`CompiledDecodeStep.step`: x -> h and logits. Returns 0, or how many words `memory`, a workspace, needs; then call again.

    matrices: int64 [L, 7], addresses; window: 0 for none. chosen: int64 [L, T, K], experts that are written.
    """
    norm, router, attend, attend_group = addresses[:4]
    qkv_rows, out_rows, ffn_rows, logit_rows, qkv_width, out_width, hidden, logit_width = shapes
    (tokens, width), experts_used = x.shape, chosen.shape[2]
    if tokens == 0:
        return 0
    queries, size = out_width[0], 2 * frequencies.size
    heads, groups = queries // size, qkv_rows[1] // size
    keys = groups * size
    everyone, whole = np.empty((tokens, 1), np.int64), np.empty((tokens, 1), np.float32)
    routing_weights = np.empty((tokens, experts_used), np.float32)
    normed, added = np.empty((tokens, width), np.float32), np.empty((tokens, width), np.float32)
    made = np.empty(tokens * (queries + 2 * keys), np.float32)
    q = made[: tokens * queries].reshape(tokens, heads, size)
    k = made[tokens * queries : tokens * (queries + keys)].reshape(tokens, groups, size)
    v = made[tokens * (queries + keys) :].reshape(tokens, groups, size)
    attended = np.empty((tokens, heads, size), np.float32)
    oldest = np.empty(tokens, np.int64)
    for t in range(tokens):
        everyone[t, 0], whole[t, 0] = 0, 1
        oldest[t] = max(0, positions[t] + 1 - window) if window > 0 else 0
        for i in range(width):
            h[t, i] = x[t, i]
    flat = added.reshape(-1)
    dense, gated = bool(0), bool(1)  # as literals they would be types, each compiled by itself
    lacks: int = 0
    for layer in range(len(matrices)):
        expert_ids, span = chosen[layer], spans[SPANS * layer : SPANS * (layer + 1)]
        of_layer = matrices[layer]
        _call_norm(norm, (h, attn_norm[layer], epsilon, normed))
        given = variant, normed, everyone, whole, qkv_width, of_layer[:3], qkv_rows, dense, made
        lacks = max(lacks, _timed_products(given, addresses, memory, threads, span[0]))
        _call_attention(
            attend,
            (q, k, v, places[layer], capacities, kind, positions, oldest, frequencies, attended, attend_group),
        )
        x_out = attended.reshape(tokens, queries)
        given = variant, x_out, everyone, whole, out_width, of_layer[3:4], out_rows, dense, flat
        lacks = max(lacks, _timed_products(given, addresses, memory, threads, span[1]))
        for t in range(tokens):
            for i in range(width):
                h[t, i] += added[t, i]
        _call_norm(norm, (h, ffn_norm[layer], epsilon, normed))
        _call_router(router, (normed, ffn_gate_inp[layer], expert_ids, routing_weights))
        given = variant, normed, expert_ids, routing_weights, hidden, of_layer[4:], ffn_rows, gated, flat
        lacks = max(lacks, _timed_products(given, addresses, memory, threads, span[2]))
        if lacks > 0:
            return lacks
        for t in range(tokens):
            for i in range(width):
                h[t, i] += added[t, i]
    _call_norm(norm, (h, output_norm, epsilon, normed))
    given = variant, normed, everyone, whole, logit_width, output, logit_rows, dense, logits
    return int(_timed_products(given, addresses, memory, threads, spans[-1]))

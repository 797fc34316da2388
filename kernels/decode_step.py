"""The decode step as one compiled call: single tokens through all blocks; `CompiledDecodeStep` validates its arguments.

One call, because the weights evict Python's code and data from the caches between two products: 1 ms a layer of
Mixtral's shape. It calls the same kernels as the other paths, so results agree bit by bit, but for a layer norm's mean.
Knows the order of operations, which `models` describes; not files or tensors.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numba import njit, typeof

from fiddler.kernels import attention_kernels, norm_router
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import exponential
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.heads import heads
from fiddler.kernels.machine.clock import now
from fiddler.kernels.matmul import grouped
from fiddler.kernels.matmul.epilogues import PLAIN, SWIGLU

__all__ = ["SPANS", "addresses", "compile_decode", "decode"]

SPANS = 4
"""Timed products of each layer: query, key and value; attention's output; dense feed-forward; routed experts."""

_call_norm, _call_router, _call_heads = norm_router.normalise.call, norm_router.router.call, heads.call
_call_attention, _call_products = attention_kernels.attention.call, grouped.products.call


def compile_decode(variant: KernelVariant, kv_dtype: np.dtype) -> None:
    """Compile `CompiledDecodeStep.step` for KV caches of this type, or read it from the cache; computes nothing."""
    empty, row, no_ints = np.empty((0, 2), np.float32), np.ones(2, np.float32), np.empty(0, np.int64)
    weights = (
        empty,
        (empty,) * 5,
        empty,
        empty[None],
        *(empty, empty, empty),
        no_ints.reshape(0, 7, 1),
        no_ints.reshape(0, 3, 1),
        no_ints.reshape(0, 3, 1),
        no_ints.reshape(0, 10, 2),
        row,
        no_ints[None],
        no_ints.reshape(0, 2),
    )
    needed_words = decode(
        variant,
        (0,) * 8,
        empty,
        *weights,
        (np.ones(3, np.int64),) * 8,
        no_ints.reshape(0, 3),
        norm_router.Routing().values(),
        (np.float32(0), 0, np.float32(1), np.float32(1), 0, SWIGLU),
        np.empty((0, 1, 2, 1, 1, 2), kv_dtype),
        no_ints,
        no_ints,
        no_ints,
        no_ints,
        row,
        np.float32(0),
        1,
        grouped.workspace.words,
        empty,
        empty.reshape(-1),
        no_ints.reshape(0, 0, 1),
        np.empty((1, 2)),
    )
    assert needed_words == 0


@lru_cache(maxsize=64)
def addresses(variant: KernelVariant, kv_dtype: np.dtype) -> tuple[int, ...]:
    """The addresses of the kernels that `decode` calls; compiled or read from the cache first."""
    return (
        norm_router.normalise.address(),
        norm_router.router.address(),
        heads.address(),
        attention_kernels.attention.address(attention_kernels.pool_type(kv_dtype)),
        attention_kernels.addresses(kv_dtype),
        grouped.products.address(typeof(variant)),
        *grouped.addresses(variant),
    )


@njit(**OPTIONS)
def _timed_products(
    arguments: tuple[Any, ...], biases: np.ndarray, addresses: Any, memory: np.ndarray, threads: int, span: np.ndarray
) -> int:
    """Call `grouped_products`; write its begin and end [s] to `span`."""
    span[0] = now()
    needed_words: int = _call_products(addresses[5], (*arguments, biases, memory, threads, addresses[6:]))
    span[1] = now()
    return needed_words


@njit(**OPTIONS, fastmath=FASTMATH)
def _normalise(
    norm: int, h: np.ndarray, weight: np.ndarray, epsilon: np.float32, layer_norm: int, out: np.ndarray
) -> None:
    """out = RMS norm of h [T, D], whose kernel's address is `norm`; or its layer norm: of h less each row's mean."""
    if layer_norm == 0:
        _call_norm(norm, (h, weight, epsilon, out))
        return
    for t in range(h.shape[0]):
        total = np.float32(0)
        for i in range(h.shape[1]):
            total += h[t, i]
        mean = total / np.float32(h.shape[1])
        for i in range(h.shape[1]):
            out[t, i] = h[t, i] - mean
    _call_norm(norm, (out, weight, epsilon, out))


@njit(**OPTIONS, fastmath=FASTMATH)
def _add(h: np.ndarray, added: np.ndarray, scale: np.float32) -> None:
    """h += scale * added."""
    for t in range(h.shape[0]):
        for i in range(h.shape[1]):
            h[t, i] += scale * added[t, i]


@njit(**OPTIONS, fastmath=FASTMATH)
def _gates(x: np.ndarray, gate: np.ndarray, out: np.ndarray) -> None:
    """out [T, 1] = sigmoid(x . gate), or 1 where there is no gate."""
    for t in range(x.shape[0]):
        total = np.float32(0)
        for i in range(gate.size):
            total += x[t, i] * gate[i]
        out[t, 0] = np.float32(1) / (np.float32(1) + exponential(-total)) if gate.size > 0 else np.float32(1)


@partial(kernel, parallel=False)
def decode(
    variant: KernelVariant,
    addresses: tuple[int, ...],
    x: np.ndarray,
    attn_norm: np.ndarray,
    head_weights: tuple[np.ndarray, ...],
    ffn_norm: np.ndarray,
    ffn_gate_inp: np.ndarray,
    selection_bias: np.ndarray,
    router_bias: np.ndarray,
    shared_gate: np.ndarray,
    matrices: np.ndarray,
    expert_matrices: np.ndarray,
    expert_biases: np.ndarray,
    stored: np.ndarray,
    output_norm: np.ndarray,
    output: np.ndarray,
    output_kind: np.ndarray,
    shapes: tuple[np.ndarray, ...],
    dense_rows: np.ndarray,
    rule: tuple[Any, ...],
    parts: tuple[Any, ...],
    pool: np.ndarray,
    tables: np.ndarray,
    first: np.ndarray,
    positions: np.ndarray,
    windows: np.ndarray,
    frequencies: np.ndarray,
    epsilon: np.float32,
    threads: int,
    memory: np.ndarray,
    h: np.ndarray,
    logits: np.ndarray,
    all_expert_ids: np.ndarray,
    spans: np.ndarray,
) -> int:
    """`CompiledDecodeStep.step`: x -> h, logits. Returns 0, or the words that `memory`, a workspace, needs: call again.

    head_weights: biases [L, (H + 2 G) * head_dim], norms of queries and of keys, biases [L, D] of the output, sinks [L,
    H], each with no columns where there are none. ffn_gate_inp, selection_bias, router_bias: of the S layers with
    routed experts, the last ones. Addresses, int64: matrices [L, 7, 1], 4 of attention, 3 of the dense feed-forward,
    which has dense_rows [L, 3] rows: 0 where there is none; expert_matrices, expert_biases [S, 3, E]; output [1, 1].
    stored [L, 10, 2]: `blocks.stored_as` of each, the experts' before those of the dense feed-forward; output_kind [1,
    2]. rule: `Routing.values`. parts: clamp, halves, scale of queries, scale of residuals, see `prepare_heads`; 1 for
    layer norms; the routed experts' activation. pool, tables, first: see `attention_kernels.attend`. windows: int64
    [L], 0 for none. all_expert_ids: int64 [S, T, K], written.
    """
    norm, router, prepare, attend, attend_group = addresses[:5]
    qkv_rows, out_rows, ffn_rows, logit_rows, qkv_columns, out_columns, hidden, logit_columns = shapes
    biases, q_norm, k_norm, output_bias, sinks = head_weights
    clamp, halves, q_scale, residual_scale, layer_norm, activation = parts
    sigmoid, renormalise, routing_scale, expert_groups, groups_used = rule
    (tokens, width), experts_used = x.shape, all_expert_ids.shape[2]
    if tokens == 0:
        return 0
    queries, head_dim = out_columns[0], 2 * frequencies.size
    heads, groups = queries // head_dim, qkv_rows[1] // head_dim
    keys = groups * head_dim
    dense_layers = len(matrices) - len(all_expert_ids)
    dense_ids, dense_weights = np.empty((tokens, 1), np.int64), np.empty((tokens, 1), np.float32)
    shared_weights = np.empty((tokens, 1), np.float32)
    routing_weights = np.empty((tokens, experts_used), np.float32)
    normed, added = np.empty((tokens, width), np.float32), np.empty((tokens, width), np.float32)
    qkv, no_bias = np.empty(tokens * (queries + 2 * keys), np.float32), np.empty(0, np.float32)
    q_rows = qkv[: tokens * queries].reshape(tokens, queries)
    k_rows = qkv[tokens * queries : tokens * (queries + keys)].reshape(tokens, keys)
    v_rows = qkv[tokens * (queries + keys) :].reshape(tokens, keys)
    q, k, v = (
        q_rows.reshape(tokens, heads, head_dim),
        k_rows.reshape(tokens, groups, head_dim),
        v_rows.reshape(tokens, groups, head_dim),
    )
    attended = np.empty((tokens, heads, head_dim), np.float32)
    oldest, one = np.empty(tokens, np.int64), np.float32(1)
    for t in range(tokens):
        dense_ids[t, 0], dense_weights[t, 0] = 0, 1
        for i in range(width):
            h[t, i] = x[t, i]
    flat, no_biases = added.reshape(-1), np.empty((3, 0), np.int64)
    dense, gated = np.int64(PLAIN), np.int64(SWIGLU)  # not literals: Numba would compile once for each literal type
    needed_words: int = 0
    for layer in range(len(matrices)):
        span, sparse = spans[SPANS * layer : SPANS * (layer + 1)], layer - dense_layers
        at, kinds = matrices[layer], stored[layer]
        _normalise(norm, h, attn_norm[layer], epsilon, layer_norm, normed)
        arguments = variant, normed, dense_ids, dense_weights, qkv_columns, at[:3], kinds[:3], qkv_rows, dense, qkv
        needed_words = max(needed_words, _timed_products(arguments, no_biases, addresses, memory, threads, span[0]))
        bias = biases[layer]
        q_bias, k_bias, v_bias = no_bias, no_bias, no_bias
        if bias.size > 0:
            q_bias, k_bias, v_bias = bias[:queries], bias[queries : queries + keys], bias[queries + keys :]
        _call_heads(prepare, (q_rows, q_bias, q_norm[layer], epsilon, clamp, head_dim, halves, q_scale))
        _call_heads(prepare, (k_rows, k_bias, k_norm[layer], epsilon, clamp, head_dim, halves, one))
        _call_heads(prepare, (v_rows, v_bias, no_bias, epsilon, clamp, head_dim, 0, one))
        for t in range(tokens):
            oldest[t] = max(0, positions[t] + 1 - windows[layer]) if windows[layer] > 0 else 0
        _call_attention(
            attend,
            (q, k, v, pool, layer, tables, first, positions, oldest, frequencies, sinks[layer], attended, attend_group),
        )
        x_out = attended.reshape(tokens, queries)
        arguments = variant, x_out, dense_ids, dense_weights, out_columns, at[3:4], kinds[3:4], out_rows, dense, flat
        needed_words = max(needed_words, _timed_products(arguments, no_biases, addresses, memory, threads, span[1]))
        if output_bias.shape[1] > 0:
            _call_heads(prepare, (added, output_bias[layer], no_bias, epsilon, np.float32(0), head_dim, 0, one))
        _add(h, added, residual_scale)
        _normalise(norm, h, ffn_norm[layer], epsilon, layer_norm, normed)
        rows = dense_rows[layer]
        if rows[0] > 0:  # a dense layer's feed-forward, or shared experts
            _gates(normed, shared_gate[max(sparse, 0)], shared_weights)
            arguments = variant, normed, dense_ids, shared_weights, rows[:1], at[4:], kinds[7:], rows, gated, flat
            needed_words = max(needed_words, _timed_products(arguments, no_biases, addresses, memory, threads, span[2]))
            _add(h, added, residual_scale)
        if sparse >= 0:
            expert_ids = all_expert_ids[sparse]
            choice = sigmoid, renormalise, routing_scale, expert_groups, groups_used, expert_ids, routing_weights
            weights = normed, ffn_gate_inp[sparse], selection_bias[sparse], router_bias[sparse]
            _call_router(router, (*weights, *choice))
            at, of_experts = expert_matrices[sparse], expert_biases[sparse]
            arguments = variant, normed, expert_ids, routing_weights, hidden, at, kinds[4:7], ffn_rows, activation, flat
            needed_words = max(
                needed_words, _timed_products(arguments, of_experts, addresses, memory, threads, span[3])
            )
            _add(h, added, residual_scale)
        if needed_words > 0:
            return needed_words
    _normalise(norm, h, output_norm, epsilon, layer_norm, normed)
    arguments = variant, normed, dense_ids, dense_weights, logit_columns, output, output_kind, logit_rows, dense, logits
    return int(_timed_products(arguments, no_biases, addresses, memory, threads, spans[-1]))

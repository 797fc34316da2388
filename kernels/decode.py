"""Compiled decode step for single tokens of a few sequences: validates the model's weights once, calls `decode_step`.

Knows arrays; not files, tensors or KV caches beyond their pool and its tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fiddler.kernels.attention import check_tables, joined
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.decode_step import SPANS, addresses, decode
from fiddler.kernels.decode_weights import MATRICES, BlockParts, BlockWeights, check_blocks
from fiddler.kernels.expert_matrices import bias_addresses
from fiddler.kernels.kv_rows import row_length
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul import grouped
from fiddler.kernels.matmul.blocks import stored_as, stored_kinds
from fiddler.kernels.matmul.epilogues import CLAMPED, SWIGLU
from fiddler.kernels.stored_rows import StoredRows

__all__ = ["BlockParts", "BlockWeights", "CompiledDecodeStep", "StepSpans"]


class StepSpans(NamedTuple):
    """Chosen experts and times of a step's large products; `CompiledDecodeStep.spans` reads them."""

    expert_ids: np.ndarray  # int64 [L, T, K]: each layer's choice
    times: np.ndarray  # float64 [products, 2]: begin and end of each [s]


class CompiledDecodeStep:
    """Takes one token of each of a few sequences through all blocks, the final norm and the output layer."""

    def __init__(
        self,
        token_embd: np.ndarray | StoredRows,
        blocks: Sequence[BlockWeights],
        output_norm: np.ndarray,
        output: np.ndarray,
        variant: KernelVariant,
        frequencies: np.ndarray,
        epsilon: float,
        experts_used: int,
        window: int | None,
        parts: BlockParts | None = None,
        output_variant: KernelVariant | None = None,
    ) -> None:
        """token_embd: [V, D], float32, float16 or the uint16 bits of bf16, or `StoredRows`; output_norm: float32 [D].

        output: stored [V, D]; variant: how the blocks' and output's weights are read, unless `BlockWeights.variants`
        or output_variant say otherwise.
        frequencies: float32 [head_dim / 2], in radians a position (RoFormer); window: as in `attend_each`.
        experts_used: 0 where no block has routed experts.
        parts: how the blocks compute; None: as Mixtral's.
        Raises ValueError when a shape, a data type or the memory order does not fit.
        """
        parts = parts or BlockParts()
        output_variant = output_variant or variant
        variants = variant, output_variant
        check_blocks(blocks, output_norm, output, variants, frequencies, experts_used, window, parts)
        last = blocks[-1]
        vocabulary, width = len(output), output_norm.size
        if token_embd.shape != (vocabulary, width) or token_embd.dtype not in (np.float32, np.float16, np.uint16):
            raise ValueError(
                f"token_embd is {token_embd.dtype} {token_embd.shape}; expected 16 bits or float32 {vocabulary, width}"
            )
        experts, hidden, _ = (0, 0, 0) if last.gate is None else last.gate.shape
        queries, keys = len(last.attn_q), len(last.attn_k)
        self._embeddings, self._parts = token_embd, parts
        self._blocks, self._output = list(blocks), output  # keeps the memory alive: `_weights` has its addresses
        self._variant, self._experts_used = variant, experts_used
        self._window = None if parts.every_second else window  # of all layers
        self._windows = np.array([0 if parts.every_second and i % 2 else window or 0 for i in range(len(blocks))])
        self._head_dim, self._groups = 2 * len(frequencies), keys // (2 * len(frequencies))
        self._width, self._vocabulary = width, vocabulary
        self._sparse = [block for block in blocks if block.sparse]
        self._weights = _stacked(blocks, output_norm, output, variants)
        rows = [queries, keys, keys], [width], [hidden, hidden, width], [vocabulary]
        elements = [width], [queries], [hidden] * experts, [width]
        self._shapes = tuple(np.array(each, np.int64) for each in (*rows, *elements))
        inner = [0 if block.dense_gate is None else len(block.dense_gate) for block in blocks]
        self._widest = max(experts_used * hidden, *inner)  # hidden rows of a feed-forward, for one token
        self._dense_rows = np.array([[each, each, width if each else 0] for each in inner])
        self._numbers = (
            np.float32(parts.clamp),
            parts.halves,
            np.float32(parts.query_scale),
            np.float32(parts.residual_scale),
            int(parts.layer_norm),
            CLAMPED if parts.clamped else SWIGLU,
        )
        self._frequencies, self._epsilon = frequencies, np.float32(epsilon)

    def step(
        self, tokens: Sequence[int], pool: np.ndarray, tables: Sequence[np.ndarray], positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, StepSpans]:
        """One token of each of T sequences -> hidden states [T, D] and logits [T, V], float32, and the `StepSpans`.

        pool, tables, positions: see `attend_each`; position `positions[t]` is written.
        Raises ValueError when a shape, a data type or a number does not fit.
        """
        self._check_step(tokens, pool, tables, positions)
        x = self._embedded(tokens)
        position_array = np.array(positions, np.int64)
        expert_ids = np.empty((len(self._sparse), len(x), self._experts_used), np.int64)
        times = np.empty((SPANS * len(self._blocks) + 1, 2))
        h, logits = np.empty_like(x), np.empty((len(x), self._vocabulary), np.float32)
        with threads_for(3 * x.size * self._widest) as threads:
            needed_words = 1
            while needed_words > 0:
                needed_words = decode(
                    self._variant.grouping,
                    addresses(self._variant.grouping, pool.dtype),
                    x,
                    *self._weights,
                    self._shapes,
                    self._dense_rows,
                    self._parts.routing.values(),
                    self._numbers,
                    pool,
                    *joined(tables),
                    position_array,
                    self._windows,
                    self._frequencies,
                    self._epsilon,
                    threads,
                    grouped.workspace.words,
                    h,
                    logits.reshape(-1),
                    expert_ids,
                    times,
                )
                if needed_words > 0:
                    grouped.workspace.grow(needed_words)
        if self._parts.logit_scale != 1.0:
            logits /= np.float32(self._parts.logit_scale)
        return h, logits, StepSpans(expert_ids, times)

    def _check_step(
        self, tokens: Sequence[int], pool: np.ndarray, tables: Sequence[np.ndarray], positions: Sequence[int]
    ) -> None:
        if not len(tokens) == len(tables) == len(positions) > 0:
            raise ValueError(f"{len(tokens)} tokens of {len(tables)} sequences at {len(positions)} positions")
        shape = (len(self._blocks), 2, self._groups)
        length = row_length(pool.dtype, self._head_dim)
        if pool.ndim != 6 or pool.shape[1:4] != shape or pool.shape[5] != length or not pool.shape[4]:
            raise ValueError(f"the pool is {pool.shape}; expected [blocks, {shape}, P, {length}]")
        if not (pool.flags.c_contiguous and pool.flags.writeable):
            raise ValueError("the pool must be contiguous and writeable")
        check_tables(pool, tables, positions, self._window)
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise ValueError(f"a token of {tokens} lies outside 0..{self._vocabulary - 1}")

    def _embedded(self, tokens: Sequence[int]) -> np.ndarray:
        """The tokens' embeddings as float32 [T, D]."""
        rows = self._embeddings[np.array(tokens)]
        wide = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows.astype(np.float32)
        if self._parts.embedding_scale == 1.0:
            return wide
        with np.errstate(all="ignore"):  # as torch: a damaged file's numbers may be infinite
            return wide * np.float32(self._parts.embedding_scale)

    def spans(self, step_spans: StepSpans) -> Iterator[tuple[str, float, float, int]]:
        """For each large product of a step: its kind, begin [s], end [s] and the weights that it read [bytes].

        Kinds: "dense" and "experts". Clock: CLOCK_MONOTONIC, as time.perf_counter.
        """
        expert_ids, times = iter(step_spans.expert_ids.tolist()), step_spans.times.tolist()
        for layer, block in enumerate(self._blocks):
            products = [("dense", block.attn_q.nbytes + block.attn_k.nbytes + block.attn_v.nbytes)]
            products.append(("dense", block.attn_output.nbytes))
            products.append(("dense", sum(bits.nbytes for bits in block.matrices[4:] if bits is not None)))
            experts_read = len({expert for ids in next(expert_ids) for expert in ids}) if block.sparse else 0
            expert_bytes = sum(each.expert_bytes for each in block.experts)
            products.append(("experts", experts_read * expert_bytes))
            for (name, nbytes), (began, ended) in zip(products, times[SPANS * layer :], strict=False):
                if nbytes:  # else the block has no such product
                    yield name, began, ended, nbytes
        yield "dense", *times[-1], self._output.nbytes


def _stacked(
    blocks: Sequence[BlockWeights],
    output_norm: np.ndarray,
    output: np.ndarray,
    variants: tuple[KernelVariant, KernelVariant],
) -> tuple[Any, ...]:
    """The weights as `decode` takes them."""
    sparse = [block for block in blocks if block.sparse]
    addresses_of = [[[0 if bits is None else address_of(bits)] for bits in block.matrices] for block in blocks]
    experts_of = [[each.addresses for each in block.experts] for block in sparse]

    def stack(name: str, of: Sequence[BlockWeights]) -> np.ndarray:
        return np.stack([getattr(block, name) for block in of])

    no_router, no_vector = np.empty((0, 0, 0), np.float32), np.empty((1, 0), np.float32)
    return (
        stack("attn_norm", blocks),
        tuple(stack(name, blocks) for name in ("attn_bias", "q_norm", "k_norm", "output_bias", "sinks")),
        stack("ffn_norm", blocks),
        stack("ffn_gate_inp", sparse) if sparse else no_router,
        stack("selection_bias", sparse) if sparse else no_vector,
        stack("router_bias", sparse) if sparse else no_vector,
        stack("shared_gate", sparse) if sparse else no_vector,  # a dense layer reads the first one's size
        np.array(addresses_of),
        np.array(experts_of) if sparse else np.empty((0, 3, 0), np.int64),
        np.stack([bias_addresses(block.experts) for block in sparse]) if sparse else np.empty((0, 3, 0), np.int64),
        np.array([_stored_kinds(block, output_norm.size, variants[0]) for block in blocks]),
        output_norm,
        np.array([[address_of(output)]]),
        stored_kinds(variants[1:], (output_norm.size,)),
    )


def _stored_kinds(block: BlockWeights, width: int, variant: KernelVariant) -> list[tuple[int, int]]:
    """`blocks.stored_as` of each matrix of a block; of one that it lacks, zeros."""
    columns = {
        "attn_output": len(block.attn_q),
        "down": 0 if block.gate is None else block.gate.shape[1],
        "dense_down": 0 if block.dense_gate is None else len(block.dense_gate),
    }
    return [
        (0, 0)
        if getattr(block, name) is None
        else stored_as(block.variants.get(name, variant), columns.get(name, width))
        for name in MATRICES
    ]

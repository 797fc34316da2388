"""Compiled decode step for single tokens of a few sequences: validates the model's weights once, calls `decode_step`.

Knows arrays; not files, tensors or KV caches beyond their `KVPointers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fiddler.kernels.attention import KVPointers
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.decode_step import SPANS, addresses, decode
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul import grouped

__all__ = ["BlockWeights", "CompiledDecodeStep", "StepSpans"]


@dataclass(frozen=True)
class BlockWeights:
    """One transformer block's weights: float32, or uint16 bits where no type is noted; read-only mappings will do."""

    attn_norm: np.ndarray  # float32 [D]
    attn_q: np.ndarray  # [H * head_dim, D]
    attn_k: np.ndarray  # [G * head_dim, D]
    attn_v: np.ndarray  # [G * head_dim, D]
    attn_output: np.ndarray  # [D, H * head_dim]
    ffn_norm: np.ndarray  # float32 [D]
    ffn_gate_inp: np.ndarray  # float32 [E, D]
    gate: np.ndarray  # [E, F, D]
    up: np.ndarray  # [E, F, D]
    down: np.ndarray  # [E, D, F]


class StepSpans(NamedTuple):
    """Chosen experts and times of a step's large products; `CompiledDecodeStep.spans` reads them."""

    expert_ids: np.ndarray  # int64 [L, T, K]: each layer's choice
    times: np.ndarray  # float64 [products, 2]: begin and end of each [s]


class CompiledDecodeStep:
    """Takes one token of each of a few sequences through all blocks, the final norm and the output layer."""

    def __init__(
        self,
        token_embd: np.ndarray,
        blocks: Sequence[BlockWeights],
        output_norm: np.ndarray,
        output: np.ndarray,
        variant: KernelVariant,
        frequencies: np.ndarray,
        epsilon: float,
        experts_used: int,
        window: int | None,
    ) -> None:
        """token_embd: [V, D], float32, float16 or the uint16 bits of bf16; output_norm: float32 [D].

        output: uint16 bits [V, D]; variant: how the blocks' and output's bits are read.
        frequencies: float32 [head_dim / 2], in radians a position (RoFormer); window: as in `attend_each`.
        Raises ValueError when a shape, a data type or the memory order does not fit.
        """
        _validate(blocks, output_norm, output, frequencies, experts_used, window)
        if token_embd.shape != output.shape or token_embd.dtype not in (np.float32, np.float16, np.uint16):
            raise ValueError(
                f"token_embd is {token_embd.dtype} {token_embd.shape}; expected 16 bits or float32 {output.shape}"
            )
        first = blocks[0]
        vocabulary, width = output.shape
        experts, hidden, _ = first.gate.shape
        queries, keys = len(first.attn_q), len(first.attn_k)
        self._embeddings = token_embd
        self._blocks, self._output = list(blocks), output  # keeps the memory alive: `_weights` has its addresses
        self._variant, self._window, self._experts_used = variant, window, experts_used
        self._head_dim, self._groups = 2 * len(frequencies), keys // (2 * len(frequencies))
        self._width, self._vocabulary = width, vocabulary
        matrices = [(b.attn_q, b.attn_k, b.attn_v, b.attn_output, b.gate, b.up, b.down) for b in blocks]
        self._weights = (
            np.stack([block.attn_norm for block in blocks]),
            np.stack([block.ffn_norm for block in blocks]),
            np.stack([block.ffn_gate_inp for block in blocks]),
            np.array([[address_of(bits) for bits in block_matrices] for block_matrices in matrices]),
            output_norm,
            np.array([address_of(output)]),
        )
        rows = [queries, keys, keys], [width], [hidden, hidden, width], [vocabulary]
        elements = [width], [queries], [hidden] * experts, [width]
        self._shapes = tuple(np.array(each) for each in (*rows, *elements))
        self._frequencies, self._epsilon = frequencies, np.float32(epsilon)

    def step(
        self, tokens: Sequence[int], kv_pointers: Sequence[KVPointers], positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, StepSpans]:
        """One token of each of T sequences -> hidden states [T, D] and logits [T, V], float32, and the `StepSpans`.

        kv_pointers: each sequence's keys and values; position `positions[t]` is written. No two share memory.
        Raises ValueError when a shape, a data type or a number does not fit.
        """
        if not len(tokens) == len(kv_pointers) == len(positions) > 0:
            raise ValueError(f"{len(tokens)} tokens of {len(kv_pointers)} sequences at {len(positions)} positions")
        if len({id(pointers) for pointers in kv_pointers}) < len(kv_pointers):
            raise ValueError("a sequence appears twice in a step")
        dtype, shape = kv_pointers[0].dtype, (len(self._blocks), self._groups, self._head_dim)
        for token, pointers, position in zip(tokens, kv_pointers, positions, strict=True):
            groups, capacity, head_dim = pointers.shape
            if (len(pointers.addresses), groups, head_dim) != shape or pointers.dtype != dtype:
                raise ValueError(
                    f"{len(pointers.addresses)} layers' keys are {pointers.dtype} {pointers.shape}; expected {shape}"
                )
            if not 0 <= position < capacity:
                raise ValueError(f"position {position} lies outside 0..{capacity - 1}")
            if not 0 <= token < self._vocabulary:
                raise ValueError(f"token {token} lies outside 0..{self._vocabulary - 1}")
        x = self._embedded(tokens)
        position_array = np.array(positions, np.int64)
        kv_addresses = (
            kv_pointers[0].addresses
            if len(x) == 1
            else np.concatenate([pointers.addresses for pointers in kv_pointers], 2)
        )
        capacities = np.array([pointers.shape[1] for pointers in kv_pointers])
        expert_ids = np.empty((len(self._blocks), len(x), self._experts_used), np.int64)
        times = np.empty((SPANS * len(self._blocks) + 1, 2))
        h, logits = np.empty_like(x), np.empty((len(x), self._vocabulary), np.float32)
        with threads_for(3 * x.size * self._experts_used * self._blocks[0].gate.shape[1]) as threads:
            needed_words = 1
            while needed_words > 0:
                needed_words = decode(
                    self._variant,
                    addresses(self._variant, dtype),
                    x,
                    *self._weights,
                    self._shapes,
                    kv_addresses,
                    capacities,
                    kv_pointers[0].empty,
                    position_array,
                    self._window or 0,
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
        return h, logits, StepSpans(expert_ids, times)

    def _embedded(self, tokens: Sequence[int]) -> np.ndarray:
        """The tokens' embeddings as float32 [T, D]."""
        rows: np.ndarray = self._embeddings[np.array(tokens)]
        return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows.astype(np.float32)

    def spans(self, step_spans: StepSpans) -> Iterator[tuple[str, float, float, int]]:
        """For each large product of a step: its kind, begin [s], end [s] and the weights that it read [bytes].

        Kinds: "dense" and "experts". Clock: CLOCK_MONOTONIC, as time.perf_counter.
        """
        products: list[tuple[str, int]] = []
        for block, token_expert_ids in zip(self._blocks, step_spans.expert_ids.tolist(), strict=True):
            products.append(("dense", block.attn_q.nbytes + block.attn_k.nbytes + block.attn_v.nbytes))
            products.append(("dense", block.attn_output.nbytes))
            experts_read = len({expert for ids in token_expert_ids for expert in ids})
            expert_bytes = (block.gate.nbytes + block.up.nbytes + block.down.nbytes) // len(block.gate)
            products.append(("experts", experts_read * expert_bytes))
        products.append(("dense", self._output.nbytes))
        for (name, nbytes), (began, ended) in zip(products, step_spans.times.tolist(), strict=True):
            yield name, began, ended, nbytes


def _validate(
    blocks: Sequence[BlockWeights],
    output_norm: np.ndarray,
    output: np.ndarray,
    frequencies: np.ndarray,
    experts_used: int,
    window: int | None,
) -> None:
    if not blocks:
        raise ValueError("no blocks")
    first, head_dim = blocks[0], 2 * frequencies.size
    if output.ndim != 2 or first.gate.ndim != 3 or first.attn_q.ndim != 2 or first.attn_k.ndim != 2:
        raise ValueError(
            f"output is {output.shape}, gate {first.gate.shape}, attn_q {first.attn_q.shape}, attn_k "
            f"{first.attn_k.shape}; expected [V, D], [E, F, D], [H * head_dim, D], [G * head_dim, D]"
        )
    width, queries, keys = output.shape[1], len(first.attn_q), len(first.attn_k)
    experts, hidden, _ = first.gate.shape
    if frequencies.ndim != 1 or not head_dim or queries % head_dim or not keys or keys % head_dim or queries % keys:
        raise ValueError(f"{queries} rows of attn_q, {keys} of attn_k, {frequencies.shape} frequencies")
    if not 1 <= experts_used <= experts:
        raise ValueError(f"{experts_used} of {experts} experts")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; give at least 1")
    floats = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_gate_inp": (experts, width)}
    shapes = floats | {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "gate": (experts, hidden, width),
        "up": (experts, hidden, width),
        "down": (experts, width, hidden),
    }
    arrays = [(name, getattr(block, name), shapes[name], name in floats) for block in blocks for name in shapes]
    arrays += [("output_norm", output_norm, (width,), True), ("output", output, output.shape, False)]
    arrays += [("frequencies", frequencies, frequencies.shape, True)]
    for name, array, shape, is_float in arrays:
        dtype = np.float32 if is_float else np.uint16
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; expected contiguous {np.dtype(dtype).name} {shape}"
            )

"""Slow, obvious oracles in float64: what the kernels must compute."""

from __future__ import annotations

import numpy as np

__all__ = ["EPSILON", "attend_one", "every_f16", "expert_ffn", "from_bits", "round_bf16", "to_bits"]


EPSILON = 2e-6
"""Error of a float32 sum of a few hundred products, relative to the sum of their magnitudes."""


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Values as uint16 bits of "bf16" (truncated) or "f16" (rounded)."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits of "bf16" or "f16" as float64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def every_f16(width: int) -> tuple[np.ndarray, np.ndarray]:
    """All 65536 values of f16, each in a row of `width` that is 0 elsewhere: bits, and the values as float32."""
    values = np.arange(1 << 16, dtype=np.uint16)
    bits = np.zeros((values.size, width), np.uint16)
    bits[values, values % width] = values
    return bits, values.view(np.float16).astype(np.float32)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Finite values rounded to bf16, ties to even, as float64."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)


def expert_ffn(
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    kind: str,
    *,
    rounded: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """One token and one expert at a time: the output [T, D], and the tolerance of float32 sums [T, D].

    `rounded`: x and the SwiGLU product are rounded to bf16 before they are multiplied. The tolerance is EPSILON times
    the sums of magnitudes; where such an error can carry a hidden value over a tie of the rounding, that step is added.
    """
    y = np.zeros((x.shape[0], down.shape[1]))
    tolerance = np.zeros_like(y)
    for t in range(x.shape[0]):
        token = round_bf16(x[t]) if rounded else x[t].astype(np.float64)
        for j, e in enumerate(expert_ids[t]):
            G, U, W, weight = (
                from_bits(gate[e], kind),
                from_bits(up[e], kind),
                from_bits(down[e], kind),
                routing_weights[t, j],
            )
            g, u = G @ token, U @ token
            h = g / (1 + np.exp(-g)) * u
            error = EPSILON * (np.abs(G) @ np.abs(token)) * (np.abs(U) @ np.abs(token))
            if rounded:
                error = round_bf16(h + error) - round_bf16(h - error)
                h = round_bf16(h)
            y[t] += weight * (W @ h)
            tolerance[t] += weight * (np.abs(W) @ (error + EPSILON * np.abs(h)))
    return y, tolerance


def attend_one(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    frequencies: np.ndarray,
    window: int | None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One head at a time: the output [H, head_dim] and the rotated key [G, head_dim], nothing rounded but the angles.

    Angles are float32 products, as in the kernel. sinks: one more score of each head, which has no value.
    """
    angles = (np.float32(position) * frequencies).astype(np.float64)
    rotation = np.exp(1j * angles)

    def rotated(row: np.ndarray) -> np.ndarray:
        pairs = (row[0::2] + 1j * row[1::2].astype(np.float64)) * rotation
        return np.stack([pairs.real, pairs.imag], 1).reshape(-1)

    keys, values = keys.astype(np.float64), values.astype(np.float64)
    new = np.array([rotated(row) for row in k])
    keys[:, position], values[:, position] = new, v
    oldest = 0 if window is None else max(0, position + 1 - window)
    out = np.empty(q.shape)
    for h in range(len(q)):
        g = h // (len(q) // len(k))
        scores = keys[g, oldest : position + 1] @ rotated(q[h]) / q.shape[1] ** 0.5
        all_scores = scores if sinks is None else np.append(scores, np.float64(sinks[h]))
        exponentials = np.exp(all_scores - all_scores.max())
        out[h] = (exponentials / exponentials.sum())[: len(scores)] @ values[g, oldest : position + 1]
    return out, new

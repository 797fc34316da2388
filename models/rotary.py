"""Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864) in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fiddler.models.config import Config
from fiddler.models.interfaces import Norm
from fiddler.models.rope_scaling import RopeKind
from fiddler.models.router import rms_norm

__all__ = ["heads", "rotary_cos_sin", "rotary_frequencies", "rotate", "to_neighbours"]


def heads(
    q: Tensor,
    k: Tensor,
    norms: Sequence[Tensor],
    epsilon: float,
    head_dim: int,
    halves: int,
    norm: Norm = rms_norm,
) -> tuple[Tensor, Tensor]:
    """Heads of queries [T, H, head_dim] and of keys [T, G, head_dim], as a KV cache takes them.

    q, k: products [T, H or G * head_dim]. norms: none, or the weights of RMS norms of both, of each head or of all.
    halves: a head's elements that rotate, where each does with the one half of them away: they become neighbours; 0
    where they are, already.
    """
    shaped = []
    for i, x in enumerate((q, k)):
        each = norm(x.reshape(-1, len(norms[i])), norms[i], epsilon) if norms else x
        each = each.view(len(x), -1, head_dim)
        shaped.append(to_neighbours(each, halves) if halves else each)
    return shaped[0], shaped[1]


def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """Frequency [radians per position] of each pair of a head's elements (RoFormer): float32 [head_dim / 2].

    0 for elements that are not rotated, the last ones.
    """
    pairs = torch.arange(0, config.rotated, 2, dtype=torch.float32, device=device)
    frequencies = torch.zeros(config.head_dim // 2, device=device)
    frequencies[: len(pairs)] = _scaled(1.0 / config.rope_freq_base ** (pairs / config.rotated), config)
    return frequencies


def _scaled(frequencies: Tensor, config: Config) -> Tensor:
    """The frequencies of the rotated pairs, scaled as `RopeScaling` says."""
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind is RopeKind.DIVISORS:
        return frequencies / torch.tensor(scaling.divisors, device=frequencies.device)
    if scaling.kind is RopeKind.LINEAR:
        return frequencies / scaling.factor
    low, high = scaling.whole_pairs(config.rotated, config.rope_freq_base)
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    divided = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def to_neighbours(x: Tensor, rotated: int) -> Tensor:
    """Bring elements that rotate together, i and i + rotated / 2, next to each other: x [..., head_dim] -> as x.

    Queries and keys are reordered alike, so their products stay the same.
    """
    halves = x[..., :rotated].reshape(*x.shape[:-1], 2, rotated // 2)
    pairs = halves.transpose(-1, -2).flatten(-2)
    return pairs if rotated == x.shape[-1] else torch.cat([pairs, x[..., rotated:]], -1)


def rotary_cos_sin(config: Config, positions: Tensor, *, rotated_alone: bool = False) -> Tensor:
    """cos + i sin of each pair's angle at each of `positions` [T]: complex64 [T, 1, head_dim / 2].

    rotated_alone: of the pairs that are rotated, [T, 1, rotated / 2].
    """
    pairs = config.rotated // 2 if rotated_alone else None
    angles = positions[:, None].float() * rotary_frequencies(config, positions.device)[:pairs]
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (GGUF's order), as complex numbers, by `cos_sin`: x [T, heads, head_dim] -> as x."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cos_sin).flatten(-2)

"""Protocols of a model's collaborators: experts, linears, KV cache, router and norm. Knows shapes; no backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fiddler.models.architecture import RouterRule

__all__ = ["Cache", "Embeddings", "Experts", "Heads", "Linear", "Norm", "Router", "RouterWeights"]


class Experts(Protocol):
    """Computes a layer's routed experts, on whatever device their weights are."""

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """x [T, D] float32, expert_ids [T, K], routing_weights [T, K] -> weighted sum of expert outputs [T, D].

        layer: the number among the layers with routed experts.
        """
        ...


class Embeddings(Protocol):
    """The embeddings [V, D], a tensor or what looks rows up as one."""

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        ...

    def __getitem__(self, ids: Tensor, /) -> Tensor:
        """Token ids [T] -> their rows [T, D]."""
        ...


class Linear(Protocol):
    """Multiplies by a weight, named as in the file."""

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """x [T, in] float32 -> x . weight transposed, [T, out] float32; plus `onto` [T, out]."""
        ...

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The product of x with each of several weights."""
        ...

    def feed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) of weights gate, up [I, D] and down [D, I].

        x [T, D] float32 -> down . (silu(gate . x) * (up . x)), [T, D] float32.
        """
        ...

    def per_head(self, x: Tensor, name: str) -> Tensor:
        """x [T, H, in] float32 -> each head's product with its own matrix of the weight [H, out, in], [T, H, out]."""
        ...


class Heads(Protocol):
    """Makes heads of queries and keys, as a `Cache` takes them."""

    def __call__(
        self, q: Tensor, k: Tensor, norms: Sequence[Tensor], epsilon: float, head_dim: int, halves: int
    ) -> tuple[Tensor, Tensor]:
        """q [T, H * head_dim], k [T, G * head_dim] -> [T, H, head_dim], [T, G, head_dim]; see `rotary.heads`."""
        ...


class Cache(Protocol):
    """The KV caches of a step's sequences; knows the position of each row of the step."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Rotate q [T, H, head_dim] and k [T, G, head_dim] to their positions; store k and v [T, G, head_dim].

        In latent attention only k is stored: the stored keys are the values, too. sinks: float32 [H], see
        `attention.attend`.
        Returns causal attention of each row over its own sequence: [T, H, head_dim] float32.
        """
        ...


@dataclass(frozen=True)
class RouterWeights:
    """A layer's norm [D] before the router and the experts, the router's matrix [E, D], and biases [E].

    The selection bias is added to scores for the choice only, the other one to the router's logits.
    """

    norm: Tensor
    gate: Tensor
    selection_bias: Tensor | None = None
    bias: Tensor | None = None


class Router(Protocol):
    """Normalises the experts' input and chooses each token's experts."""

    def __call__(
        self, h: Tensor, epsilon: float, weights: RouterWeights, rule: RouterRule, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, D] -> x [T, D], expert_ids and routing_weights [T, K]; see `router.route`."""
        ...


class Norm(Protocol):
    """RMS normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x [..., D], weight [D] -> [..., D]."""
        ...

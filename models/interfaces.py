"""What a model is handed: experts, linears, a cache, a router and a norm, as protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Cache", "Experts", "Linear", "Norm", "Router"]


class Experts(Protocol):
    """Computes a layer's routed experts, wherever they live."""

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """x [T, D] float32, expert_ids [T, K], routing_weights [T, K] -> the weighted sum of the experts' outputs, [T, D]."""
        ...


class Linear(Protocol):
    """Multiplies by a named weight of the file."""

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """x [T, in] float32 -> x . weight transposed, [T, out] float32; plus `onto`, of that shape."""
        ...

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The same for several weights that take the same x."""
        ...


class Cache(Protocol):
    """Keeps keys and values of the sequences of a step; knows the position of each of its rows."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q [T, H, head_dim] and k [T, G, head_dim] to their positions, store k and v [T, G, head_dim].

        Then causal attention of each row over its own sequence: [T, H, head_dim] float32.
        """
        ...


class Router(Protocol):
    """Normalises what goes to the experts, and chooses each token's."""

    def __call__(
        self, h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, D], norm [D], weight [E, D] -> what `route` gives."""
        ...


class Norm(Protocol):
    """RMS normalisation (Zhang and Sennrich 2019)."""

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D]."""
        ...

"""How importances of weights become weights of their rounding errors. Knows no formats by name, and no searches.

As ggml's quantisers do (`ggml-quants.c`): importance * sqrt(factor * mean square of the neighbours + own square).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Weighting"]


@dataclass(frozen=True)
class Weighting:
    """The rule of a format."""

    factor: float
    """Of the neighbours' mean square."""
    whole_row: bool = False
    """The neighbours are the row; otherwise they are the block."""
    plain: bool = False
    """The importance alone."""

    def of(self, values: np.ndarray, importance: np.ndarray, block_length: int) -> np.ndarray:
        """Weights (float32) of values [..., K] from importances of the same shape. What is no number counts as 0."""
        if self.plain:
            return np.ascontiguousarray(importance, np.float32)
        length = values.shape[-1] if self.whole_row else block_length
        squares = np.square(values.reshape(-1, length), dtype=np.float64)
        squares[~np.isfinite(squares)] = 0
        squares += self.factor * squares.mean(axis=-1, keepdims=True)
        np.sqrt(squares, out=squares)
        squares *= importance.reshape(squares.shape)
        weights: np.ndarray = squares.astype(np.float32)
        return weights

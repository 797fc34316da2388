"""Scaling of the rotary embedding for contexts longer than in training, as a value. Knows neither torch nor files.

The formulas are those of transformers' `modeling_rope_utils.py`; `rotary.py` computes frequencies by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fiddler.errors import FileFormatError

__all__ = ["RopeKind", "RopeScaling", "llama3_divisors", "yarn_attention_factor"]


class RopeKind(StrEnum):
    """How frequencies are scaled."""

    LINEAR = "linear"  # all divided by the factor: https://arxiv.org/abs/2306.15595
    YARN = "yarn"  # the slow ones divided, the fast ones not: https://arxiv.org/abs/2309.00071
    DIVISORS = "divisors"  # each pair's divided by a number of its own, as in Llama 3.1


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a model's rotary embedding are scaled, and attention with them.

    `divisors`: [rotated / 2] of `DIVISORS`; empty while only the header of a file was read.
    `attention_factor`: rotated queries and keys are multiplied by it.
    `log_multiplier`: `mscale_all_dim` of DeepSeek's YaRN; 0: attention's scores are not scaled.
    `truncate`: whether YaRN's first and last partly divided pair are whole numbers.
    """

    kind: RopeKind
    factor: float = 1.0
    original_context_length: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    log_multiplier: float = 0.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 < value < 1e9):
                raise FileFormatError(f"rope.scaling.{name} is {value}; it must be positive")
        if not (math.isfinite(self.log_multiplier) and 0.0 <= self.log_multiplier < 1e3):
            raise FileFormatError(f"rope.scaling.yarn_log_multiplier is {self.log_multiplier}; it must not be negative")
        if self.kind is RopeKind.YARN and not 1 <= self.original_context_length < 1 << 31:
            raise FileFormatError(
                f"rope.scaling.original_context_length is {self.original_context_length}; it must be positive"
            )
        if not all(math.isfinite(divisor) and divisor > 0.0 for divisor in self.divisors):
            raise FileFormatError("rope_freqs.weight holds a number that is not positive; convert the model again")

    @property
    def score_scale(self) -> float:
        """The number that attention's scores are multiplied by, beside `attention_factor` (DeepSeek's mscale^2)."""
        return yarn_attention_factor(self.factor, self.log_multiplier) ** 2

    def whole_pairs(self, rotated: int, base: float) -> tuple[float, float]:
        """YaRN: pairs up to the first number keep their frequency; from the second on it is divided by the factor."""

        def pair(rotations: float) -> float:
            """The pair that rotates this often within the original context."""
            return rotated * math.log(self.original_context_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        return low, high + 0.001 if low == high else high


def yarn_attention_factor(factor: float, multiplier: float = 1.0) -> float:
    """YaRN's factor of queries and keys for a context longer by `factor`, section 3.4 of the paper."""
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


def llama3_divisors(
    frequencies: Sequence[float], factor: float, low: float, high: float, original_context_length: int
) -> tuple[float, ...]:
    """What Llama 3.1 divides each pair's frequency [radians a position] by: 1 for fast ones, `factor` for slow ones.

    low, high: rotations within the original context up to which a pair is slow, from which it is fast.
    """
    divisors = []
    for frequency in frequencies:
        rotations = original_context_length * frequency / (2 * math.pi)
        smooth = (rotations - low) / (high - low) if high != low else 1.0
        share = min(max(smooth, 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - share) / factor + share))
    return tuple(divisors)

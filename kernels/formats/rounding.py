"""Rounding to codes: without a search, as Q4_0 to Q5_1 are made, and with one, as the K-quants. Knows no layouts.

The searches are those of ggml's reference quantisers (`ggml-quants.c`): candidates for a scale, each refined by least
squares, and the one with the least weighted error wins.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS

__all__ = ["nearest", "range_codes", "search_positive", "search_range", "search_signed", "signed_codes"]

_ONE = np.float32(1)


@njit(**OPTIONS)
def signed_codes(x: np.ndarray, half: int, codes: np.ndarray) -> np.float32:
    """Codes 0 to 2 * half - 1, of which `half` stands for 0; returns the scale, by which the extreme is code 0.

    As `gguf.quants` computes Q4_0 and Q5_0, in every bit.
    """
    extreme = x[0]
    for value in x:
        if abs(value) > abs(extreme) or (np.isnan(value) and not np.isnan(extreme)):
            extreme = value
    d = extreme / np.float32(-half)
    inverse = _ONE / d if d != 0 else np.float32(0)
    for j in range(x.size):
        codes[j] = _clipped(np.trunc(x[j] * inverse + (np.float32(half) + np.float32(0.5))), 2 * half - 1)
    scale: np.float32 = d
    return scale


@njit(**OPTIONS)
def range_codes(x: np.ndarray, largest: int, codes: np.ndarray) -> tuple[np.float32, np.float32]:
    """Codes 0 to `largest` from the least to the greatest value; returns the scale and the least value.

    As `gguf.quants` computes Q4_1 and Q5_1, in every bit.
    """
    least, greatest = x[0], x[0]
    for value in x:
        if value < least or np.isnan(value):
            least = value
        if value > greatest or np.isnan(value):
            greatest = value
    d = (greatest - least) / np.float32(largest)
    inverse = _ONE / d if d != 0 else np.float32(0)
    for j in range(x.size):
        codes[j] = _clipped(np.trunc((x[j] - least) * inverse + np.float32(0.5)), largest)
    return d, least


@njit(**OPTIONS)
def _clipped(value: np.float32, largest: int) -> np.uint8:
    """A whole number as a code; what is no number becomes 0."""
    if not value > 0:
        return np.uint8(0)
    return np.uint8(largest) if value > largest else np.uint8(value)


@njit(**OPTIONS)
def nearest(value: np.float32, least: int, greatest: int) -> int:
    """The nearest integer, ties to even, within these bounds; what is no number becomes the least."""
    if not value > least:
        return least
    if value > greatest:
        return greatest
    return int(np.rint(value))


@njit(**OPTIONS, fastmath=FASTMATH)
def search_range(
    x: np.ndarray,
    weights: np.ndarray,
    largest: int,
    candidates: tuple[float, float, int],
    absolute: bool,
    codes: np.ndarray,
) -> tuple[np.float32, np.float32]:
    """The scale and the minimum m (>= 0) for which scale * code - m is near x, codes 0 to `largest`.

    candidates: first, distance and number of steps: a step tries the scale range / (largest + first + distance * step).
    absolute: sums absolute errors, not squares. codes: float32, work space.
    """
    first, distance, steps = candidates
    least, greatest = min(x.min(), np.float32(0)), x.max()
    sum_w, sum_x = np.float32(0), np.float32(0)
    for i in range(x.size):
        sum_w += weights[i]
        sum_x += weights[i] * x[i]
    if not greatest > least:
        return np.float32(0), -least
    best_scale, best_error = (greatest - least) / np.float32(largest), np.float32(np.inf)
    for step in range(-1, steps + 1):  # the first candidate is not refined; a better one's minimum is the next one's
        inverse = np.float32(largest + (first + distance * step if step >= 0 else 0.0)) / (greatest - least)
        sum_l, sum_l2, sum_xl = np.float32(0), np.float32(0), np.float32(0)
        for i in range(x.size):
            code = np.rint(min(max(inverse * (x[i] - least), np.float32(0)), np.float32(largest)))
            codes[i] = code
            sum_l += weights[i] * code
            sum_l2 += weights[i] * code * code
            sum_xl += weights[i] * code * x[i]
        scale, bottom = best_scale, least
        if step >= 0:
            determinant = sum_w * sum_l2 - sum_l * sum_l
            if not determinant > 0:
                continue
            scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            bottom = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if bottom > 0:
                scale, bottom = sum_xl / sum_l2, np.float32(0)
        error = np.float32(0)
        for i in range(x.size):
            difference = abs(scale * codes[i] + bottom - x[i])
            error += weights[i] * (difference if absolute else difference * difference)
        if error < best_error:
            best_scale, least, best_error = scale, bottom, error
    return best_scale, -least


@njit(**OPTIONS, fastmath=FASTMATH)
def search_signed(x: np.ndarray, weights: np.ndarray, half: int) -> np.float32:
    """The scale for which scale * code is near x, codes -half to half - 1."""
    extreme = np.float32(0)
    for value in x:
        if abs(value) > abs(extreme):
            extreme = value
    if not abs(extreme) >= np.float32(1e-15):
        return np.float32(0)
    best_scale, best = np.float32(0), np.float32(0)
    for step in range(-10, 10):
        # the whole range first, then wider and narrower ones
        inverse = -np.float32(half + (0.1 * step if step > -10 else 0.0)) / extreme
        sum_xl, sum_l2 = np.float32(0), np.float32(0)
        for i in range(x.size):
            code = np.rint(min(max(inverse * x[i], np.float32(-half)), np.float32(half - 1)))
            sum_xl += weights[i] * x[i] * code
            sum_l2 += weights[i] * code * code
        if sum_l2 > 0 and (step == -10 or sum_xl * sum_xl > best * sum_l2):
            best_scale = sum_xl / sum_l2
            best = best_scale * sum_xl
    return best_scale


@njit(**OPTIONS, fastmath=FASTMATH)
def search_positive(x: np.ndarray, weights: np.ndarray, largest: int) -> np.float32:
    """The scale for which scale * code is near x (>= 0), codes 0 to `largest`.

    The best of a few candidates; its codes then move one by one to the nearest of what least squares gives.
    """
    greatest = x.max()
    if not greatest >= np.float32(1e-15):
        return np.float32(0)
    best_inverse, best_error = np.float32(0), np.float32(np.inf)
    for step in range(-4, 5):
        inverse = np.float32(largest + 0.1 * step) / greatest
        error = np.float32(0)
        for i in range(x.size):
            difference = x[i] - np.rint(min(inverse * x[i], np.float32(largest))) / inverse
            error += weights[i] * difference * difference
        if error < best_error:
            best_inverse, best_error = inverse, error
    codes = np.empty(x.size, np.float32)
    sum_xl, sum_l2 = np.float32(0), np.float32(0)
    for i in range(x.size):
        codes[i] = np.rint(min(best_inverse * x[i], np.float32(largest)))
        sum_xl += weights[i] * x[i] * codes[i]
        sum_l2 += weights[i] * codes[i] * codes[i]
    for _ in range(5):
        changed = False
        for i in range(x.size):
            xl, l2 = sum_xl - weights[i] * x[i] * codes[i], sum_l2 - weights[i] * codes[i] * codes[i]
            if not (xl > 0 and l2 > 0):
                continue
            code = np.rint(min(x[i] * l2 / xl, np.float32(largest)))
            xl, l2 = xl + weights[i] * x[i] * code, l2 + weights[i] * code * code
            if code != codes[i] and xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                codes[i], sum_xl, sum_l2, changed = code, xl, l2, True
        if not changed:
            break
    return sum_xl / sum_l2 if sum_l2 > 0 else np.float32(0)

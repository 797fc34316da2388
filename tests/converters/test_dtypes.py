"""Conversion of dtypes agrees with torch for every 16-bit pattern and every way that a float32 can round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fiddler.converters.dtypes import RangeLoss, to_bits, to_float32

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def every_upper_half() -> np.ndarray:
    """float32 values of every upper half, with lower halves that are cut, tie, or just miss a tie."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (EVERY_16_BITS.astype(np.uint32)[:, None] << np.uint32(16)) | lower
    return bits.ravel().view(np.float32)


SOURCES = {
    "bf16": EVERY_16_BITS,
    "f16": EVERY_16_BITS.view(np.float16),
    "f32": every_upper_half(),
}


def as_torch(values: np.ndarray) -> torch.Tensor:
    if values.dtype == np.uint16:
        return torch.from_numpy(values.copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


@pytest.mark.parametrize("source", SOURCES)
def test_widening_to_float32_is_exact(source):
    wide, expected = to_float32(SOURCES[source]), as_torch(SOURCES[source]).float().numpy()
    not_nan = ~np.isnan(expected)
    assert np.array_equal(wide.view(np.uint32)[not_nan], expected.view(np.uint32)[not_nan])
    assert np.isnan(wide[~not_nan]).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrowing_rounds_and_counts_as_torch_does(source, dtype):
    values = SOURCES[source]
    bits, loss = to_bits(values, dtype)
    expected = as_torch(values).to(TORCH[dtype])
    nan = expected.isnan().numpy()
    assert np.array_equal(bits[~nan], expected.view(torch.uint16).numpy()[~nan])
    widened = as_torch(bits if dtype == "bf16" else bits.view(np.float16)).float().numpy()
    assert np.isnan(widened[nan]).all()
    wide = as_torch(values).float().numpy()
    assert loss.overflowed == np.sum(np.isfinite(wide) & np.isinf(widened))
    assert loss.flushed == np.sum((wide != 0) & (widened == 0))
    assert loss.rounded == np.sum((wide != widened) & ~np.isnan(wide))
    assert loss.nans == np.sum(nan)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_conversion_to_the_same_type_changes_no_bit(dtype):
    bits, loss = to_bits(SOURCES[dtype], dtype)
    assert np.array_equal(bits, EVERY_16_BITS)
    assert loss == RangeLoss(0, 0, nans=2 * (2 ** (7 if dtype == "bf16" else 10) - 1))  # of each sign, all bit patterns


def test_values_that_overflow_or_flush_to_zero_are_counted():
    values = np.array([[65504, 65520, -1e9], [np.inf, 0, 1e-9]], np.float32)
    bits, loss = to_bits(values, "f16")
    assert bits.tolist() == [[0x7BFF, 0x7C00, 0xFC00], [0x7C00, 0, 0]]
    assert loss == RangeLoss(overflowed=2, flushed=1, rounded=3)
    assert loss + RangeLoss(1, 1, 1, 1) == RangeLoss(3, 2, 1, 4)


def test_a_nan_whose_payload_is_all_in_the_lower_half_stays_a_nan():
    values = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert to_bits(values, "bf16")[0].tolist() == [0x7FC0, 0xFFFF]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_random_bits_of_float32_are_counted_where_they_change(dtype):
    values = np.random.default_rng(1).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    small = np.float32(2) ** np.random.default_rng(2).integers(-30, -10, 1 << 16).astype(np.float32)  # subnormal in f16
    values = np.concatenate([values, small, small * 1.5, small * (1 + 2.0**-10)]).astype(np.float32)
    bits, loss = to_bits(values.reshape(-1, 64), dtype)
    back = to_float32(bits if dtype == "bf16" else bits.view(np.float16)).reshape(-1)
    assert loss.rounded == np.sum((back != values) & ~np.isnan(values))
    assert to_bits(back, dtype)[1].rounded == 0

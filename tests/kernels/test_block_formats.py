"""Quantised formats: decoding against the `gguf` package's and transformers' dequantisers, encoding against gguf's."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.gguf import dequant

from fiddler import kernels
from fiddler.kernels.formats import BLOCK_FORMATS

TIERS = kernels.available_tiers()
BY_GGUF = "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"  # types that the `gguf` package quantises
NOT_IN_TRANSFORMERS = "q5_0", "q5_1", "mxfp4"
K = 512
# errors of llama.cpp's quantisers (ggml_quantize_chunk, commit 0c1e570) on `normal_weights`, relative to the weights
GGML_ERRORS = {
    "q2_k": 0.29708,
    "q3_k": 0.15167,
    "q4_k": 0.07155,
    "q5_k": 0.03619,
    "q6_k": 0.01779,
    "iq4_nl": 0.07624,
    "iq4_xs": 0.07685,
}
# the same with importances of the columns (`importances`), the errors weighted by them
GGML_WEIGHTED_ERRORS = {
    "q8_0": 0.00535,
    "q4_0": 0.07136,
    "q4_1": 0.05511,
    "q5_0": 0.03539,
    "q5_1": 0.02673,
    "q2_k": 0.19910,
    "q3_k": 0.12075,
    "q4_k": 0.05634,
    "q5_k": 0.02938,
    "q6_k": 0.01464,
    "iq4_nl": 0.06355,
    "iq4_xs": 0.06446,
    "mxfp4": 0.11406,
}


def kind_of(name):
    return gguf.GGMLQuantizationType[name.upper()]


def dequantised(stored, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about NaN and infinite scales
        return gguf.dequantize(stored, kind_of(name))


def normal_weights(rows=256):
    return (np.random.default_rng(1).standard_normal((rows, 2048)) * 0.02).astype(np.float32)


def importances():
    return np.exp(1.5 * np.random.default_rng(2).standard_normal(2048)).astype(np.float32)


def weighted_error(name, values, importance, given):
    decoded = dequantised(BLOCK_FORMATS[name].encode(values, given), name)
    return np.sqrt((importance * (decoded - values) ** 2).sum() / (importance * values**2).sum())


def assert_same_bits(actual, expected):
    """Every bit, and a NaN for a NaN of any kind."""
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_random_blocks_decode_to_the_bits_that_gguf_computes(name, tier):
    """Random bytes have scales of NaN and infinity, too."""
    stored = np.random.default_rng(0).integers(0, 256, (96, BLOCK_FORMATS[name].row_bytes(K)), np.uint8)
    expected = dequantised(stored, name)
    assert name == "mxfp4" or np.isnan(expected).any()
    assert_same_bits(kernels.decode_stored(stored, name, tier), expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_of_real_weights_decode_to_the_bits_that_gguf_and_transformers_compute(name):
    stored = BLOCK_FORMATS[name].encode(normal_weights(8))
    actual = kernels.decode_stored(stored, name, TIERS[0])
    assert_same_bits(actual, dequantised(stored, name))
    if name not in NOT_IN_TRANSFORMERS:
        assert_same_bits(actual, dequant.dequantize(torch.from_numpy(stored), kind_of(name)).view(actual.shape).numpy())


@pytest.mark.parametrize("name", BY_GGUF)
def test_types_without_a_search_are_encoded_as_gguf_encodes_them(name):
    values = normal_weights(16)
    values[0] = 0
    values[1] *= np.float32(1e-7)  # scales that are subnormal float16 numbers
    values[2, ::64] = 0.5
    values[3] = np.round(values[3] * 500) / 500  # ties
    expected = gguf.quantize(values, kind_of(name))
    np.testing.assert_array_equal(BLOCK_FORMATS[name].encode(values), expected)


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_types_with_a_search_lose_no_more_than_two_per_cent_above_llama_cpp(name):
    values = normal_weights()
    decoded = dequantised(BLOCK_FORMATS[name].encode(values), name)
    error = np.linalg.norm(decoded - values) / np.linalg.norm(values)
    assert 0.9 * GGML_ERRORS[name] < error < 1.02 * GGML_ERRORS[name]


@pytest.mark.parametrize("name", GGML_WEIGHTED_ERRORS)
def test_with_importances_no_type_loses_more_than_two_per_cent_above_llama_cpp(name):
    values, importance = normal_weights(), importances()
    error = weighted_error(name, values, importance, np.broadcast_to(importance, values.shape))
    assert 0.98 * GGML_WEIGHTED_ERRORS[name] < error < 1.02 * GGML_WEIGHTED_ERRORS[name]
    if name not in ("q8_0", "mxfp4"):
        assert error < 0.9 * weighted_error(name, values, importance, None)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_weights_without_importance_and_values_that_are_no_numbers_leave_other_blocks_as_they_are(name):
    values, importance = normal_weights(4), np.broadcast_to(importances(), (4, 2048)).copy()
    clean = dequantised(BLOCK_FORMATS[name].encode(values, importance), name)
    values[1, 0], values[2, 0], values[3, 0] = np.nan, np.inf, 0
    importance[3, :256] = 0
    decoded = dequantised(BLOCK_FORMATS[name].encode(values, importance), name)
    assert np.isfinite(decoded[3]).all()
    np.testing.assert_array_equal(decoded[0], clean[0])
    others = decoded[1:, 256:], clean[1:, 256:]
    # Q4_0 to Q5_1 weight by the whole row's mean square, which lacks a value there
    assert np.linalg.norm(others[0] - others[1]) < 0.01 * np.linalg.norm(others[1])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_what_is_zero_stays_zero_and_what_is_no_number_harms_its_own_block_only(name):
    values = normal_weights(4)
    values[0] = 0
    values[1, 0], values[2, 0], values[3] = np.nan, np.inf, 1e30
    decoded = dequantised(BLOCK_FORMATS[name].encode(values), name)
    assert not decoded[0].any()
    clean = normal_weights(4)
    clean[0] = 0
    again = dequantised(BLOCK_FORMATS[name].encode(clean), name)
    length = BLOCK_FORMATS[name].block_length
    np.testing.assert_array_equal(decoded[1:3, length:], again[1:3, length:])


def test_rows_that_do_not_fit_the_format_are_refused():
    with pytest.raises(ValueError, match="no rows of q4_k"):
        kernels.decode_stored(np.zeros((2, 145), np.uint8), "q4_k", TIERS[0])
    with pytest.raises(ValueError, match="no rows of q4_k"):
        kernels.decode_stored(np.zeros((2, 72), np.uint16), "q4_k", TIERS[0])

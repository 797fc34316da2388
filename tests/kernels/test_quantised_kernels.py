"""Kernels on quantised weights against obvious products in float64 of what the `gguf` package dequantises."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fiddler import kernels
from fiddler.kernels import KernelVariant
from fiddler.kernels.formats import BLOCK_FORMATS

TIERS = kernels.available_tiers()
K, N = 768, 80
# few and many tokens, in whole panels and with remainders
TOKENS = 1, 2, 3, 5, 16, 17, 40, 70
EXACT = 2e-6  # a float32 sum of a few hundred products, relative to the whole
CODES = 2e-5  # the same where the offset of a code is a product by itself, and larger than the weight
BF16 = 4e-3  # weights and activations rounded to bf16: 2**-9 each, at most

VARIANTS = [(TIERS[0].name, name, "q8") for name in BLOCK_FORMATS]
VARIANTS += [(tier.name, name, "q8") for tier in TIERS[1:] for name in ("q8_0", "q4_k", "q6_k")]
VARIANTS += [(tier.name, name, "f32") for tier in TIERS for name in ("q5_1", "q6_k")]


def stored_and_values(name, *shape, seed=0):
    """Random weights in a format, and what `gguf` makes of them in float64."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5
    stored = BLOCK_FORMATS[name].encode(values)
    kind = gguf.GGMLQuantizationType[name.upper()]
    return stored, gguf.dequantize(stored, kind).astype(np.float64)


def rounded_to_int8(x):
    """Activations with a scale for each 32: magnitudes of at most 127."""
    groups = x.astype(np.float64).reshape(-1, 32)
    scales = np.abs(groups).max(1, keepdims=True) / 127
    scales[scales == 0] = 1
    return (np.rint(groups / scales) * scales).reshape(x.shape)


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def variant_of(tier, name, activations):
    return KernelVariant(kernels.choose_tier(tier), name, activations)


@pytest.mark.parametrize(("tier", "name", "activations"), VARIANTS)
def test_products_match_those_of_dequantised_weights(tier, name, activations):
    stored, weights = stored_and_values(name, N, K)
    variant = variant_of(tier, name, activations)
    for tokens in TOKENS:
        x = np.random.default_rng(tokens).standard_normal((tokens, K)).astype(np.float32)
        actual = kernels.linear(x, stored, variant)
        if activations == "f32":
            assert error(actual, x @ weights.T) < EXACT, tokens
            continue
        few = tokens % 16 if tokens > variant.tuning.int8_row_tokens else tokens
        few = few if few <= variant.tuning.int8_row_tokens else 0  # the last ones are in rows
        expected = x.astype(np.float64)
        expected[tokens - few :] = rounded_to_int8(x[tokens - few :])
        if few:
            assert error(actual[tokens - few :], expected[tokens - few :] @ weights.T) < CODES, tokens
        if few < tokens:
            limit = BF16 if variant.bf16_pairs else EXACT
            assert error(actual[: tokens - few], (expected @ weights.T)[: tokens - few]) < limit, tokens


@pytest.mark.parametrize("activations", ["q8", "f32"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_of_mixed_formats_match_float64(tokens, activations):
    experts, hidden, width = 4, 256, 512
    names = "q4_k", "q8_0", "q6_k"
    gate, up, down = (
        stored_and_values(name, experts, *shape, seed=seed)
        for seed, (name, shape) in enumerate(
            zip(names, [(hidden, width), (hidden, width), (width, hidden)], strict=True)
        )
    )
    random = np.random.default_rng(tokens)
    x = random.standard_normal((tokens, width)).astype(np.float32)
    expert_ids = np.array([random.permutation(experts)[:2] for _ in range(tokens)])
    routing_weights = random.random((tokens, 2)).astype(np.float32)
    variants = tuple(variant_of(None, name, activations) for name in names)
    y = kernels.expert_ffn(x, expert_ids, routing_weights, gate[0], up[0], down[0], variants)
    expected = np.zeros((tokens, width))
    for t in range(tokens):
        for e, weight in zip(expert_ids[t], routing_weights[t], strict=True):
            g, u = gate[1][e] @ x[t], up[1][e] @ x[t]
            expected[t] += weight * (down[1][e] @ (g / (1 + np.exp(-g)) * u))
    assert error(y, expected) < (EXACT if activations == "f32" else 0.02)


def test_an_activation_that_is_no_number_makes_its_tokens_outputs_none():
    stored, _ = stored_and_values("q8_0", N, K)
    variant = variant_of(None, "q8_0", "q8")
    x = np.ones((2, K), np.float32)
    for value in (np.nan, np.inf):
        x[1, 5] = value
        y = kernels.linear(x, stored, variant)
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()


def test_infinite_scales_make_their_own_rows_no_number():
    stored, _ = stored_and_values("q4_k", N, K)
    stored[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    for tokens in (1, 40):
        y = kernels.linear(np.ones((tokens, K), np.float32), stored, variant_of(None, "q4_k", "q8"))
        finite = np.isfinite(y).all(0)
        assert not finite[3]
        assert finite.sum() == N - 1


def test_formats_that_do_not_go_together_and_wrong_shapes_are_refused():
    stored, _ = stored_and_values("q4_k", N, K)
    x = np.ones((1, K), np.float32)
    with pytest.raises(ValueError, match="w is uint8"):
        kernels.linear(x, stored, variant_of(None, "q8_0", "q8"))
    mixed = variant_of(None, "q4_k", "q8"), variant_of(None, "bf16", "bf16")
    with pytest.raises(ValueError, match="one call cannot multiply"):
        kernels.linears(x, [stored, np.zeros((N, K), np.uint16)], mixed)
    with pytest.raises(ValueError, match="no kernel multiplies these"):
        variant_of(None, "q4_k", "bf16")

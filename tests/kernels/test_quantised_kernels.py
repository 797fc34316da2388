"""Kernels on quantised weights against obvious products in float64 of what the `gguf` package dequantises."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fiddler import kernels
from fiddler.kernels import KernelVariant
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.machine.tuning import TUNINGS

TIERS = kernels.available_tiers()
K, N = 768, 80
# few and many tokens, in whole panels and with remainders
TOKENS = 1, 2, 3, 5, 16, 17, 40, 70
EXACT = 2e-6  # a float32 sum of a few hundred products, relative to the whole
CODES = 2e-5  # the same where the offset of a code is a product by itself, and larger than the weight
BF16 = 4e-3  # weights and activations rounded to bf16: 2**-9 each, at most

ROWS = "zen5", "zen4"  # many tokens in int8 where the tier can, and not


def tier_and_rows(tier):
    """A tier with each row of tuning under which it multiplies otherwise."""
    made = {KernelVariant(tier, "q8_0", "q8", TUNINGS[row]).int8_packed: row for row in ROWS[::-1]}
    return [(tier.name, row) for row in made.values()]


VARIANTS = [(name, "q8", *each) for each in tier_and_rows(TIERS[0]) for name in BLOCK_FORMATS]
VARIANTS += [
    (name, "q8", *each) for tier in TIERS[1:] for each in tier_and_rows(tier) for name in ("q8_0", "q4_k", "q6_k")
]
VARIANTS += [(name, "f32", tier.name, "zen5") for tier in TIERS for name in ("q5_1", "q6_k")]


def stored_and_values(name, *shape, seed=0):
    """Random weights in a format, and what `gguf` makes of them in float64."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5
    stored = BLOCK_FORMATS[name].encode(values)
    kind = gguf.GGMLQuantizationType[name.upper()]
    return stored, gguf.dequantize(stored, kind).astype(np.float64)


def steps(x):
    """The scale of each activation: a 127th of the largest magnitude of 32 neighbours, float32."""
    groups = x.reshape(-1, 32)
    return np.repeat(np.abs(groups).max(1, keepdims=True) / np.float32(127), 32, 1).reshape(x.shape)


def rounded_to_int8(x):
    """Activations to whole steps; the quotient is that of float32, so that ties are the same."""
    groups = x.reshape(-1, 32)
    largest = np.abs(groups).max(1, keepdims=True)
    inverse = np.float32(127) / np.where(largest == 0, np.inf, largest).astype(np.float32)
    return np.rint(groups * inverse).reshape(x.shape).astype(np.float64) * steps(x)


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def variant_of(name, activations, tier=None, row="zen5"):
    return KernelVariant(kernels.choose_tier(tier), name, activations, TUNINGS[row])


IN_INT8 = [each for each in VARIANTS if variant_of(*each).int8_packed]


@pytest.mark.parametrize(("name", "activations", "tier", "row"), VARIANTS)
def test_products_match_those_of_dequantised_weights(name, activations, tier, row):
    stored, weights = stored_and_values(name, N, K)
    variant = variant_of(name, activations, tier, row)
    for tokens in TOKENS:
        x = np.random.default_rng(tokens).standard_normal((tokens, K)).astype(np.float32)
        actual = kernels.linear(x, stored, variant)
        if activations == "f32":
            assert error(actual, x @ weights.T) < EXACT, tokens
            continue
        if variant.int8_packed:
            assert error(actual, rounded_to_int8(x) @ weights.T) < CODES, tokens
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


@pytest.mark.parametrize(("name", "activations", "tier", "row"), IN_INT8)
def test_no_output_of_many_tokens_deviates_by_more_than_half_a_step_of_each_activation(name, activations, tier, row):
    width = K + (96 if BLOCK_FORMATS[name].block_length == 32 else 0)
    stored, weights = stored_and_values(name, N + 5, width)  # rows and blocks that fill no tile
    x = np.random.default_rng(0).standard_t(2, (53, width)).astype(np.float32)  # few large activations
    x[7] = 0
    actual = kernels.linear(x, stored, variant_of(name, activations, tier, row))
    assert error(actual, rounded_to_int8(x) @ weights.T) < CODES
    deviation = np.abs(actual - x @ weights.T)
    assert (deviation <= (0.5 + 1e-4) * steps(x) @ np.abs(weights).T).all()
    assert (deviation[7] == 0).all()


@pytest.mark.parametrize(("activations", "row"), [("q8", "zen5"), ("q8", "zen4"), ("f32", "zen5")])
@pytest.mark.parametrize("tokens", [1, 3, 40, 120])
def test_experts_of_mixed_formats_match_float64(tokens, activations, row):
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
    variants = tuple(variant_of(name, activations, row=row) for name in names)
    y = kernels.expert_ffn(x, expert_ids, routing_weights, gate[0], up[0], down[0], variants)
    expected = np.zeros((tokens, width))
    for t in range(tokens):
        for e, weight in zip(expert_ids[t], routing_weights[t], strict=True):
            g, u = gate[1][e] @ x[t], up[1][e] @ x[t]
            expected[t] += weight * (down[1][e] @ (g / (1 + np.exp(-g)) * u))
    assert error(y, expected) < (EXACT if activations == "f32" else 0.02)


def test_an_activation_that_is_no_number_makes_its_tokens_outputs_none():
    stored, _ = stored_and_values("q8_0", N, K)
    variant = variant_of("q8_0", "q8")
    for tokens in (2, 40):
        x = np.ones((tokens, K), np.float32)
        for value in (np.nan, np.inf):
            x[1, 5] = value
            y = kernels.linear(x, stored, variant)
            assert np.isfinite(np.delete(y, 1, 0)).all()
            assert (np.isnan(y[1]) if tokens == 2 or variant.int8_packed else ~np.isfinite(y[1])).all()


def test_infinite_scales_make_their_own_rows_no_number():
    stored, _ = stored_and_values("q4_k", N, K)
    stored[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    for tokens in (1, 40):
        y = kernels.linear(np.ones((tokens, K), np.float32), stored, variant_of("q4_k", "q8"))
        finite = np.isfinite(y).all(0)
        assert not finite[3]
        assert finite.sum() == N - 1


def test_formats_that_do_not_go_together_and_wrong_shapes_are_refused():
    stored, _ = stored_and_values("q4_k", N, K)
    x = np.ones((1, K), np.float32)
    with pytest.raises(ValueError, match="w is uint8"):
        kernels.linear(x, stored, variant_of("q8_0", "q8"))
    mixed = variant_of("q4_k", "q8"), variant_of("bf16", "bf16")
    with pytest.raises(ValueError, match="one call cannot multiply"):
        kernels.linears(x, [stored, np.zeros((N, K), np.uint16)], mixed)
    with pytest.raises(ValueError, match="no kernel multiplies these"):
        variant_of("q4_k", "bf16")

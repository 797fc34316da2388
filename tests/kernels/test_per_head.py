"""The product of each head with its own matrix against the product of one matrix, which `test_kernels.py` checks."""

from __future__ import annotations

import numpy as np
import pytest

from fiddler import kernels
from fiddler.kernels import KernelVariant
from oracles import naive

TIERS = kernels.available_tiers()
VARIANTS = [
    KernelVariant(TIERS[0], "bf16", "bf16"),
    KernelVariant(TIERS[0], "bf16", "f32"),
    KernelVariant(TIERS[0], "f16", "f32"),
    KernelVariant(kernels.TIERS[-1], "f16", "f32"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda p: f"{p.tier.name}-{p.weights}-{p.activations}")
@pytest.mark.parametrize("tokens, heads, rows, width", [(1, 4, 24, 16), (3, 5, 7, 11), (40, 3, 130, 33), (0, 2, 4, 6)])
def test_per_head_is_the_product_of_each_head(variant, tokens, heads, rows, width):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(tokens, heads, width)).astype(np.float32)
    w = naive.to_bits(rng.normal(size=(heads, rows, width)), variant.weights)
    y = kernels.per_head(x, w, variant)
    assert y.shape == (tokens, heads, rows)
    for head in range(heads):
        expected = kernels.linear(np.ascontiguousarray(x[:, head]), w[head], variant)
        np.testing.assert_array_equal(y[:, head], expected)
    for bad_x, bad_w in ((x[..., :-1], w), (x[:, 1:], w), (x, w[:, :, ::2]), (x.astype(np.float64), w)):
        with pytest.raises(ValueError, match=r"expected"):
            kernels.per_head(bad_x, bad_w, variant)

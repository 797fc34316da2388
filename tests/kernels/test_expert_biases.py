"""Experts with biases and the clamped activation, against float64, for every tier and number of tokens."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from fiddler import kernels
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.formats.mxfp4 import MXFP4
from fiddler.models.activation import activated
from fiddler.models.architecture import Activation
from oracles.naive import from_bits, to_bits

EXPERTS, WIDTH, HIDDEN = 5, 96, 64
VARIANTS = [
    *(KernelVariant(tier, "bf16", "f32") for tier in kernels.available_tiers()),
    KernelVariant(kernels.choose_tier(), "bf16", "bf16"),
    KernelVariant(kernels.choose_tier(), "f16", "f32"),
    KernelVariant(kernels.choose_tier(), "mxfp4", "f32"),
    KernelVariant(kernels.choose_tier(), "mxfp4", "q8"),
]


def stored(values, variant):
    """The values in the variant's format, and as they are read."""
    if variant.weights != "mxfp4":
        bits = to_bits(values, variant.weights)
        return bits, from_bits(bits, variant.weights)
    blocks = MXFP4.encode(values.astype(np.float32))
    decoded = gguf.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType.MXFP4)
    return blocks, decoded.reshape(values.shape).astype(np.float64)


def naive(x, expert_ids, routing_weights, weights, biases):
    """One token and one expert at a time."""
    y = np.zeros_like(x, np.float64)
    for t in range(len(x)):
        for j, e in enumerate(expert_ids[t]):
            gate, up = (weights[i][e] @ x[t] + biases[i][e] for i in range(2))
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            y[t] += routing_weights[t, j] * (weights[2][e] @ hidden + biases[2][e])
    return y


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: f"{each.tier.name}-{each.weights}-{each.activations}")
@pytest.mark.parametrize("tokens", [1, 3, 9, 40, 150])
def test_biases_and_the_clamped_activation_are_those_of_float64(variant, tokens):
    rng = np.random.default_rng(tokens)
    shapes = (EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
    both = [stored(rng.normal(size=shape) * 4 / shape[-1] ** 0.5, variant) for shape in shapes]
    biases = [rng.normal(size=shape[:2]).astype(np.float32) for shape in shapes]
    x = rng.normal(size=(tokens, WIDTH)).astype(np.float32)
    expert_ids = np.array([rng.permutation(EXPERTS)[:3] for _ in range(tokens)])
    routing_weights = rng.random(expert_ids.shape).astype(np.float32)
    matrices = [replace(ExpertMatrices.of(each), bias=bias) for (each, _), bias in zip(both, biases, strict=True)]
    y = kernels.expert_ffn(x, expert_ids, routing_weights, *matrices, variant, clamped=True)
    expected = naive(x.astype(np.float64), expert_ids, routing_weights, [decoded for _, decoded in both], biases)
    bound = {"f32": 2e-6, "bf16": 5e-3, "q8": 1.5e-2}[variant.activations]
    assert np.linalg.norm(y - expected) <= bound * np.linalg.norm(expected)


def test_the_activations_in_torch_are_those_of_float64():
    gate = up = torch.linspace(-12, 12, 101, dtype=torch.float64)
    plain = gate.numpy()
    g, u = np.minimum(plain, 7), np.clip(plain, -7, 7)
    clamped = activated(gate, up, Activation.CLAMPED).numpy()
    np.testing.assert_allclose(clamped, g / (1 + np.exp(-1.702 * g)) * (u + 1), rtol=1e-12)
    silu = activated(gate, up, Activation.SILU).numpy()
    np.testing.assert_allclose(silu, plain / (1 + np.exp(-plain)) * plain, rtol=1e-12)


def test_biases_of_another_shape_or_of_some_matrices_only_are_refused():
    variant = VARIANTS[0]
    shapes = (EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
    gate, up, down = (ExpertMatrices.of(to_bits(np.ones(shape), "bf16")) for shape in shapes)
    x, ids, weights = np.ones((1, WIDTH), np.float32), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    good = np.zeros((EXPERTS, HIDDEN), np.float32)
    for bad in (good[:, :-1], good.astype(np.float64), good[0]):
        with pytest.raises(ValueError, match="the bias of gate is"):
            kernels.expert_ffn(x, ids, weights, replace(gate, bias=bad), up, down, variant)
    with pytest.raises(ValueError, match="some matrices of the experts have biases"):
        kernels.expert_ffn(x, ids, weights, replace(gate, bias=good), up, down, variant)

"""Layers of random experts as gpt-oss has them, with biases and a clamped activation; and what they compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fiddler import kernels
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.models.architecture import Activation
from oracles import naive
from oracles.quantised_layers import dequantised, quantised_layer

__all__ = ["biased_layer", "of_experts"]


def biased_layer(kinds, activations, shape, seed=0):
    """kinds: of gate, up and down, or "bf16" or "f16". shape: experts, hidden, width. A tenth of gate is clamped."""
    rng, (experts, hidden, width) = np.random.default_rng(seed + 100), shape
    if isinstance(kinds, str):
        shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
        stacks = [naive.to_bits(rng.normal(size=each) / each[-1] ** 0.5, kinds) for each in shapes]
        variant = KernelVariant(kernels.choose_tier(), kinds, activations)
        layer = ExpertWeights(*map(ExpertMatrices.of, stacks), variant)
    else:
        layer = quantised_layer(kinds, activations, shape, seed)

    def with_bias(matrices, rows):
        return replace(matrices, bias=rng.normal(0.0, 5.0, (experts, rows)).astype(np.float32))

    gate, up, down = (with_bias(each, n) for each, n in zip((layer.gate, layer.up, layer.down), (hidden, hidden, width),
                                                          strict=True))  # fmt: skip
    return replace(layer, gate=gate, up=up, down=down, activation=Activation.CLAMPED)


def of_experts(w, x, expert_ids, routing_weights, *, begin=0, down_bias=True):
    """x [T, D], expert_ids and routing_weights [T, K] -> [T, D] in float64, of the hidden rows from `begin` on."""
    y = np.zeros(x.shape)
    for t, token in enumerate(x.astype(np.float64)):
        for e, weight in zip(expert_ids[t].tolist(), routing_weights[t].tolist(), strict=True):
            gate, up, down = (
                dequantised(matrices[e], kind.name) if w.quantised else naive.from_bits(matrices[e], kind.name)
                for matrices, kind in zip((w.gate, w.up, w.down), w.matrix_formats, strict=True)
            )
            g = np.minimum(gate[begin:] @ token + w.gate.bias[e][begin:], 7)
            u = np.clip(up[begin:] @ token + w.up.bias[e][begin:], -7, 7)
            y[t] += weight * (down[:, begin:] @ (g / (1 + np.exp(-1.702 * g)) * (u + 1)))
            y[t] += weight * w.down.bias[e] * down_bias
    return y

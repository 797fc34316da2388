"""Layers of random quantised experts, and what they compute in float64 from the weights that `gguf` dequantises."""

from __future__ import annotations

import gguf
import numpy as np

from fiddler import kernels
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.formats import BLOCK_FORMATS

__all__ = ["dequantised", "experts_in_float64", "quantised_layer"]


def quantised_layer(kinds, activations, shape, seed=0):
    """kinds: of gate, up and down. shape: experts, hidden, width."""
    rng, (experts, hidden, width) = np.random.default_rng(seed), shape
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    stacks = [
        ExpertMatrices.of(BLOCK_FORMATS[kind].encode(rng.normal(size=each) / each[-1] ** 0.5))
        for kind, each in zip(kinds, shapes, strict=True)
    ]
    of_gate, of_up, of_down = (KernelVariant(kernels.choose_tier(), kind, activations) for kind in kinds)
    return ExpertWeights(*stacks, of_gate, (of_up, of_down))


def dequantised(stored, kind):
    """float64, by the `gguf` package."""
    return gguf.dequantize(np.array(stored), gguf.GGMLQuantizationType[kind.upper()]).astype(np.float64)


def experts_in_float64(w, x, expert_ids, routing_weights):
    """x [T, D], expert_ids and routing_weights [T, K] -> [T, D]."""
    x, y = x.astype(np.float64), np.zeros(x.shape)
    for e in set(expert_ids.reshape(-1).tolist()):
        gate, up, down = (
            dequantised(matrices[e], kind.name)
            for matrices, kind in zip((w.gate, w.up, w.down), w.matrix_formats, strict=True)
        )
        t, j = np.nonzero(expert_ids == e)
        g = x[t] @ gate.T
        np.add.at(y, t, routing_weights[t, j, None] * ((g / (1 + np.exp(-g)) * (x[t] @ up.T)) @ down.T))
    return y

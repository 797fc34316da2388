"""A small orchestrator with random experts and the CPU on both sides, shared by the tests of offloading."""

from __future__ import annotations

import numpy as np
import torch

from fiddler import kernels
from fiddler.device.weight_copy import HostCopy
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.one_token import Signal
from fiddler.offload.expert_cache import Residents
from fiddler.offload.one_token import TokenInputs
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.staging_ring import Ring
from fiddler.offload.token_signals import TokenSignals
from fiddler.telemetry.recorder import SILENT
from oracles import naive

D, F, E, LAYERS, MAX_TOKENS = 48, 320, 5, 3, 70


def weights_of(kind, activations, seed=0, experts=E, hidden=F, width=D, *, apart=False):
    """apart: each expert in a memory of its own, the last one first."""
    rng = np.random.default_rng(seed)
    variant = KernelVariant(kernels.choose_tier(), kind, activations)
    shapes = [(experts, hidden, width), (experts, hidden, width), (experts, width, hidden)]

    def matrices(shape):
        stack = naive.to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, kind)
        return ExpertMatrices.of([matrix.copy() for matrix in stack[::-1]][::-1] if apart else stack)

    return [ExpertWeights(*map(matrices, shapes), variant) for _ in range(LAYERS)]


EXACT = weights_of("bf16", "f32")


def orchestrator(layers, placed, costs, weight_copy=None, rows=128, slots=3, recorder=SILENT, grouped=None):
    weight_copy = weight_copy or HostCopy()
    residents = Residents(layers, weight_copy.device)
    residents.load(placed, weight_copy, lambda nbytes: None)
    ring = Ring(weight_copy, layers, rows, slots)
    return Orchestrator(layers, residents, ring, costs, MAX_TOKENS, 1 << 20, recorder, grouped)


class Token:
    """Single tokens of an orchestrator: `compute` divides a layer, and `cpu_sum` has the CPU's part."""

    def __init__(self, experts, k, width=D):
        self.experts = experts
        self.x, self.cpu_sum = np.zeros((1, width), np.float32), np.zeros((1, width), np.float32)
        self.chosen, self.routing_weights = np.zeros((1, k), np.float32), np.zeros((1, k), np.float32)
        self.signals = TokenSignals(pinned=False)
        inputs = TokenInputs(self.x, self.chosen, self.routing_weights, self.cpu_sum)
        self.bound = experts.bind_token(inputs, self.signals)

    def compute(self, layer, expert_ids):
        """The plan, and the GPU's hidden rows of each expert of which it has some."""
        self.chosen[:] = list(expert_ids)
        self.signals.begin(1)
        self.signals.set(Signal.ARRIVED, self.signals.first)
        plan = self.experts.compute_token(layer, self.signals.first, lambda *arguments: None)
        assert self.signals.is_at(Signal.SUMMED, self.signals.first)
        self.signals.end()
        rows = {int(self.bound.expert_ids[0, j]): rows for j, rows in self.bound.gpu_rows[: plan.parts].tolist()}
        return plan, rows


def compute_layer(experts, layer, *inputs):
    """A step of one layer: x [T, D], expert_ids and routing_weights [T, K] -> [T, D], numpy arrays."""
    tensors = [torch.from_numpy(array) for array in inputs]
    return experts.step(lambda: experts.layer(layer, *tensors), len(inputs[0])).numpy()

"""A small orchestrator whose GPU is the CPU, with random experts: what the tests of offloading share."""

from __future__ import annotations

import numpy as np

from fiddler import kernels
from fiddler.device.weight_copy import HostLink
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import Product
from fiddler.offload.expert_cache import Residents
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.staging_ring import Ring
from oracles import naive

D, F, E, LAYERS, MOST = 48, 320, 5, 3, 70


def weights_of(kind, activations, seed=0):
    rng = np.random.default_rng(seed)
    product = Product(kernels.choose_tier(), kind, activations)
    shapes = [(E, F, D), (E, F, D), (E, D, F)]
    return [
        ExpertWeights(*(naive.to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, kind) for shape in shapes), product)
        for _ in range(LAYERS)
    ]


EXACT = weights_of("bf16", "f32")


def orchestrator(layers, placed, costs, link=None, rows=128, slots=3):
    link = link or HostLink()
    residents = Residents(layers, link.device)
    residents.load(placed, link, lambda nbytes: None)
    ring = Ring(link, layers, rows, slots)
    return Orchestrator(layers, residents, ring, costs, MOST, 1 << 20)

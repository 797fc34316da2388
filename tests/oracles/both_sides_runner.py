"""A runner of a model file whose experts an orchestrator computes, with the CPU on both sides."""

from __future__ import annotations

import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.weight_copy import HostCopy
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import mapped_experts
from fiddler.gpu.dense_weights import load_dense
from fiddler.gpu.layers import GpuLinear
from fiddler.models.transformer import Transformer
from fiddler.offload.expert_cache import Residents
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs
from fiddler.offload.staging_ring import Ring
from fiddler.runtime.paged_runner import PagedRunner

COSTS = Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0)


class BothSidesRunner(PagedRunner):
    """A `Runner` whose steps are an orchestrator's."""

    def __init__(self, orchestrator, *arguments):
        super().__init__(*arguments)
        self.orchestrator = orchestrator

    def _forward(self, ids, step, wanted):
        return self.orchestrator.step(lambda: self.model(ids, step, wanted), len(ids if wanted is None else wanted))


def runner_of_both_sides(path, recorder, placed, *, exact=True, rows=64, max_tokens=100):
    """placed: the residents of each layer. max_tokens: in one piece of a layer; rows: of a slot of the staging ring."""
    model_file = ModelFile.open(path)
    config, layers, copy = model_file.config, mapped_experts(model_file, kernels.choose_tier(), exact=exact), HostCopy()
    dense = load_dense(model_file, copy)
    residents = Residents(layers, copy.device)
    residents.load(placed, copy, lambda nbytes: None)
    experts = Orchestrator(layers, residents, Ring(copy, layers, rows, 3), COSTS, max_tokens, 1 << 20, recorder)
    linear = GpuLinear(dense.linears, None, exact=exact)
    model = Transformer(config, dense.tensors, linear, experts.layer, token_embd=dense.embeddings)
    return BothSidesRunner(experts, model, config.context_length, torch.float32, kernels.thread_count())

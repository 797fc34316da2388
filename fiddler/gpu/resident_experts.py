"""One token's resident experts, from the table of their addresses. Knows no graphs, nor experts that are missing."""

from __future__ import annotations

from torch import Tensor

from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.offload.orchestrator import Orchestrator

__all__ = ["run_residents"]


def run_residents(
    orchestrator: Orchestrator,
    layer: int,
    inputs: tuple[Tensor, Tensor, Tensor],
    into: Tensor,
    *,
    add: bool,
) -> None:
    """Write the weighted sum of a layer's chosen experts that are resident to `into`, float32 [1, D], or add it.

    inputs: x [1, D], expert_ids and routing_weights [1, K].
    """
    x, expert_ids, routing_weights = inputs
    weights, biases = orchestrator.layers[layer], orchestrator.biases
    experts_of_one(
        x,
        orchestrator.residents.table[layer],
        routing_weights,
        weights.gate.shape[1],
        weights,
        expert_ids=expert_ids,
        into=into,
        add=add,
        biases=None if biases is None else biases.of_layer(layer),
    )

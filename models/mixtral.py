"""Mixtral (Jiang et al. 2024, https://arxiv.org/abs/2401.04088): its row of the table of architectures."""

from __future__ import annotations

from fiddler.models.architecture import (
    Activation,
    Architecture,
    AttentionBias,
    DenseLayers,
    Norm,
    QkNorm,
    Rotary,
    RouterRule,
    SharedExperts,
    Window,
)
from fiddler.models.parts import ATTENTION, EXPERTS_OR_SINGLE, INPUTS, OUTPUTS

__all__ = ["MIXTRAL"]

MIXTRAL = Architecture(
    name="Mixtral",
    gguf_name="llama",  # with `llama.expert_count`; llama.cpp's converter permutes the rows of queries and keys
    norm=Norm.RMS,
    qk_norm=QkNorm.NONE,
    attention_bias=AttentionBias.NONE,
    window=Window.EVERY_LAYER,
    rotary=Rotary.NEIGHBOURS,
    router=RouterRule(),
    activation=Activation.SILU,
    shared_experts=SharedExperts.NONE,
    dense_layers=DenseLayers.NONE,
    inputs=INPUTS,
    block=(*ATTENTION, *EXPERTS_OR_SINGLE),
    outputs=OUTPUTS,
)

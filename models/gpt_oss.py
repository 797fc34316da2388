"""gpt-oss (https://arxiv.org/abs/2508.10925): its row of the table of architectures.

Attention sinks, a window on every second layer, biases of all products but the output's, a clamped activation; its
experts are trained in MXFP4.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import (
    Activation,
    AttentionBias,
    ExpertBias,
    Layers,
    ModelTensor,
    Role,
    Rotary,
    Sinks,
    Window,
)
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import ATTENTION, BIASES, EXPERTS

__all__ = ["GPT_OSS"]

GPT_OSS = replace(
    MIXTRAL,
    name="gpt-oss",
    gguf_name="gpt-oss",
    attention_bias=AttentionBias.ALL,
    window=Window.EVERY_SECOND,
    rotary=Rotary.HALVES,
    activation=Activation.CLAMPED,
    block=(
        *ATTENTION[:-1],
        *BIASES,
        ModelTensor(Role.OUTPUT_BIAS, "attn_output.bias", ("D",)),
        ModelTensor(Role.SINKS, "attn_sinks.weight", ("H",)),
        ModelTensor(Role.FFN_NORM, "post_attention_norm.weight", ("D",)),
        *EXPERTS,
        ModelTensor(Role.ROUTER_BIAS, "ffn_gate_inp.bias", ("E",), Layers.SPARSE),
        ModelTensor(Role.GATE_BIAS, "ffn_gate_exps.bias", ("E", "F"), Layers.SPARSE),
        ModelTensor(Role.UP_BIAS, "ffn_up_exps.bias", ("E", "F"), Layers.SPARSE),
        ModelTensor(Role.DOWN_BIAS, "ffn_down_exps.bias", ("E", "D"), Layers.SPARSE),
    ),
    may_tie=False,
    sinks=Sinks.HEAD,
    expert_bias=ExpertBias.ALL,
)

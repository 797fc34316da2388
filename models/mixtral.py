"""Mixtral (Jiang et al. 2024, https://arxiv.org/abs/2401.04088): its row of the table of architectures."""

from __future__ import annotations

from fiddler.models.architecture import (
    Activation,
    Architecture,
    AttentionBias,
    DenseLayers,
    ModelTensor,
    Norm,
    QkNorm,
    Role,
    Rotary,
    RouterRule,
    SharedExperts,
    Window,
)

__all__ = ["MIXTRAL"]

MIXTRAL = Architecture(
    name="Mixtral",
    gguf_name="llama",  # with `llama.expert_count`; llama.cpp's converter permutes the rows of queries and keys
    norm=Norm.RMS,
    qk_norm=QkNorm.NONE,
    attention_bias=AttentionBias.NONE,
    window=Window.EVERY_LAYER,
    rotary=Rotary.NEIGHBOURS,
    router=RouterRule.SOFTMAX_RENORMALISED,
    activation=Activation.SILU,
    shared_experts=SharedExperts.NONE,
    dense_layers=DenseLayers.NONE,
    inputs=(ModelTensor(Role.TOKEN_EMBEDDING, "token_embd.weight", ("V", "D")),),
    block=(
        ModelTensor(Role.ATTENTION_NORM, "attn_norm.weight", ("D",)),
        ModelTensor(Role.QUERY, "attn_q.weight", ("H * head_dim", "D")),
        ModelTensor(Role.KEY, "attn_k.weight", ("G * head_dim", "D")),
        ModelTensor(Role.VALUE, "attn_v.weight", ("G * head_dim", "D")),
        ModelTensor(Role.ATTENTION_OUTPUT, "attn_output.weight", ("D", "H * head_dim")),
        ModelTensor(Role.FFN_NORM, "ffn_norm.weight", ("D",)),
        ModelTensor(Role.ROUTER, "ffn_gate_inp.weight", ("E", "D")),
        ModelTensor(Role.GATE, "ffn_gate_exps.weight", ("E", "F", "D")),
        ModelTensor(Role.UP, "ffn_up_exps.weight", ("E", "F", "D")),
        ModelTensor(Role.DOWN, "ffn_down_exps.weight", ("E", "D", "F")),
    ),
    outputs=(
        ModelTensor(Role.OUTPUT_NORM, "output_norm.weight", ("D",)),
        ModelTensor(Role.OUTPUT, "output.weight", ("V", "D")),
    ),
)

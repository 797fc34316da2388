"""Groups of tensors that the rows of several architectures have, under llama.cpp's names. Computes nothing."""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import Layers, ModelTensor, Role

__all__ = [
    "ATTENTION",
    "BIASES",
    "DENSE",
    "EXPERTS",
    "EXPERTS_OR_SINGLE",
    "HEAD_NORMS",
    "INPUTS",
    "LATENT_ATTENTION",
    "OUTPUTS",
    "SHARED",
    "SHARED_ROUTER",
    "VECTOR_NORMS",
]

INPUTS = (ModelTensor(Role.TOKEN_EMBEDDING, "token_embd.weight", ("V", "D")),)

ATTENTION = (
    ModelTensor(Role.ATTENTION_NORM, "attn_norm.weight", ("D",)),
    ModelTensor(Role.QUERY, "attn_q.weight", ("H * head_dim", "D")),
    ModelTensor(Role.KEY, "attn_k.weight", ("G * head_dim", "D")),
    ModelTensor(Role.VALUE, "attn_v.weight", ("G * head_dim", "D")),
    ModelTensor(Role.ATTENTION_OUTPUT, "attn_output.weight", ("D", "H * head_dim")),
    ModelTensor(Role.FFN_NORM, "ffn_norm.weight", ("D",)),
)

LATENT_ATTENTION = (
    ModelTensor(Role.ATTENTION_NORM, "attn_norm.weight", ("D",)),
    ModelTensor(Role.QUERY, "attn_q.weight", ("H * key", "D"), optional=True),
    ModelTensor(Role.QUERY_DOWN, "attn_q_a.weight", ("query", "D"), optional=True),
    ModelTensor(Role.QUERY_DOWN_NORM, "attn_q_a_norm.weight", ("query",), optional=True),
    ModelTensor(Role.QUERY_UP, "attn_q_b.weight", ("H * key", "query"), optional=True),
    ModelTensor(Role.LATENT, "attn_kv_a_mqa.weight", ("head_dim", "D")),
    ModelTensor(Role.LATENT_NORM, "attn_kv_a_norm.weight", ("latent",)),
    ModelTensor(Role.KEY_UP, "attn_k_b.weight", ("H", "latent", "plain_key"), optional=True),
    ModelTensor(Role.VALUE_UP, "attn_v_b.weight", ("H", "value", "latent"), optional=True),
    ModelTensor(Role.KEY_VALUE_UP, "attn_kv_b.weight", ("H * plain_key_value", "latent"), optional=True),
    ModelTensor(Role.ATTENTION_OUTPUT, "attn_output.weight", ("D", "H * value")),
    ModelTensor(Role.FFN_NORM, "ffn_norm.weight", ("D",)),
)

BIASES = (
    ModelTensor(Role.QUERY_BIAS, "attn_q.bias", ("H * head_dim",)),
    ModelTensor(Role.KEY_BIAS, "attn_k.bias", ("G * head_dim",)),
    ModelTensor(Role.VALUE_BIAS, "attn_v.bias", ("G * head_dim",)),
)

HEAD_NORMS = (
    ModelTensor(Role.QUERY_NORM, "attn_q_norm.weight", ("head_dim",)),
    ModelTensor(Role.KEY_NORM, "attn_k_norm.weight", ("head_dim",)),
)

VECTOR_NORMS = (
    ModelTensor(Role.QUERY_NORM, "attn_q_norm.weight", ("H * head_dim",)),
    ModelTensor(Role.KEY_NORM, "attn_k_norm.weight", ("G * head_dim",)),
)

EXPERTS = (
    ModelTensor(Role.ROUTER, "ffn_gate_inp.weight", ("E", "D"), Layers.SPARSE),
    ModelTensor(Role.GATE, "ffn_gate_exps.weight", ("E", "F", "D"), Layers.SPARSE),
    ModelTensor(Role.UP, "ffn_up_exps.weight", ("E", "F", "D"), Layers.SPARSE),
    ModelTensor(Role.DOWN, "ffn_down_exps.weight", ("E", "D", "F"), Layers.SPARSE),
)

# files from before April 2024 may have a tensor an expert
EXPERTS_OR_SINGLE = tuple(
    replace(tensor, of_expert=tensor.name.replace("_exps.", ".{}.")) if "_exps." in tensor.name else tensor
    for tensor in EXPERTS
)

SHARED = (
    ModelTensor(Role.SHARED_GATE, "ffn_gate_shexp.weight", ("S", "D"), Layers.SPARSE),
    ModelTensor(Role.SHARED_UP, "ffn_up_shexp.weight", ("S", "D"), Layers.SPARSE),
    ModelTensor(Role.SHARED_DOWN, "ffn_down_shexp.weight", ("D", "S"), Layers.SPARSE),
)

SHARED_ROUTER = (ModelTensor(Role.SHARED_ROUTER, "ffn_gate_inp_shexp.weight", ("D",), Layers.SPARSE),)

DENSE = (
    ModelTensor(Role.DENSE_GATE, "ffn_gate.weight", ("I", "D"), Layers.DENSE),
    ModelTensor(Role.DENSE_UP, "ffn_up.weight", ("I", "D"), Layers.DENSE),
    ModelTensor(Role.DENSE_DOWN, "ffn_down.weight", ("D", "I"), Layers.DENSE),
)

OUTPUTS = (
    ModelTensor(Role.OUTPUT_NORM, "output_norm.weight", ("D",)),
    ModelTensor(Role.OUTPUT, "output.weight", ("V", "D")),
)

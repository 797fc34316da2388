"""The families of models that convert: transformers' keys, defaults and tensor names of each. Knows names only.

Keys, defaults and names are those of transformers' configuration and modelling files of the same `model_type`;
DeepSeek-MoE's are those of the code that its checkpoints bring along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fiddler.models import MIXTRAL
from fiddler.models.architecture import Architecture, Role
from fiddler.models.deepseek import DEEPSEEK, GLM4_MOE
from fiddler.models.granite import GRANITE_MOE
from fiddler.models.qwen import OLMOE, QWEN2_MOE, QWEN3_MOE

__all__ = ["FAMILIES", "OTHER_NAMES", "Family", "StoredAs"]


@dataclass(frozen=True)
class StoredAs:
    """A tensor's name in a layer of a checkpoint; with `{}`, one tensor for each expert.

    half: the tensor holds two of ours one after the other, in each expert; ours is the first (0) or the second (1).
    """

    name: str
    half: int | None = None


OTHER_NAMES = {
    Role.TOKEN_EMBEDDING: "model.embed_tokens.weight",
    Role.OUTPUT_NORM: "model.norm.weight",
    Role.OUTPUT: "lm_head.weight",
}

_COMMON: Mapping[Role, tuple[StoredAs, ...]] = {
    role: (StoredAs(name),)
    for role, name in {
        Role.ATTENTION_NORM: "input_layernorm.weight",
        Role.QUERY: "self_attn.q_proj.weight",
        Role.KEY: "self_attn.k_proj.weight",
        Role.VALUE: "self_attn.v_proj.weight",
        Role.QUERY_BIAS: "self_attn.q_proj.bias",
        Role.KEY_BIAS: "self_attn.k_proj.bias",
        Role.VALUE_BIAS: "self_attn.v_proj.bias",
        Role.QUERY_NORM: "self_attn.q_norm.weight",
        Role.KEY_NORM: "self_attn.k_norm.weight",
        Role.ATTENTION_OUTPUT: "self_attn.o_proj.weight",
        Role.FFN_NORM: "post_attention_layernorm.weight",
        Role.ROUTER: "mlp.gate.weight",
        Role.SELECTION_BIAS: "mlp.gate.e_score_correction_bias",
        Role.SHARED_ROUTER: "mlp.shared_expert_gate.weight",
        Role.SHARED_GATE: "mlp.shared_experts.gate_proj.weight",
        Role.SHARED_UP: "mlp.shared_experts.up_proj.weight",
        Role.SHARED_DOWN: "mlp.shared_experts.down_proj.weight",
        Role.DENSE_GATE: "mlp.gate_proj.weight",
        Role.DENSE_UP: "mlp.up_proj.weight",
        Role.DENSE_DOWN: "mlp.down_proj.weight",
    }.items()
}
"""As most families name them."""


def _experts(single: Mapping[Role, str], *stacked: tuple[str, str]) -> dict[Role, tuple[StoredAs, ...]]:
    """Names of the expert stacks: one tensor an expert first; or gate and up in one stack, down in another."""
    found = {role: [StoredAs(name)] if name else [] for role, name in single.items()}
    for gate_up, down in stacked:
        found[Role.GATE].append(StoredAs(gate_up, 0))
        found[Role.UP].append(StoredAs(gate_up, 1))
        found[Role.DOWN].append(StoredAs(down))
    return {role: tuple(names) for role, names in found.items()}


_EXPERTS = _experts(
    {
        Role.GATE: "mlp.experts.{}.gate_proj.weight",
        Role.UP: "mlp.experts.{}.up_proj.weight",
        Role.DOWN: "mlp.experts.{}.down_proj.weight",
    },
    ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # transformers 5 in memory
)


@dataclass(frozen=True)
class Family:
    """One `model_type`: its architecture, its keys in config.json where families differ, and its tensor names.

    Where a role has several names, a layer's first tensor tells which it is.
    """

    architecture: Architecture
    defaults: Mapping[str, int]  # of absent integer keys
    expert_width: str = "moe_intermediate_size"
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")  # the second as transformers 5 saves it
    epsilon: float = 1e-6
    theta: float = 1e4  # of RoPE, if no key has a base
    partial_rotary: float = 1.0  # the part of a head that is rotated, if no key says it
    refused: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # other values than these of these keys
    names: Mapping[Role, tuple[StoredAs, ...]] = field(default_factory=lambda: {**_COMMON, **_EXPERTS})


_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_ALL_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "use_sliding_window": (False,)}

_MIXTRAL = Family(
    MIXTRAL,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    expert_width="intermediate_size",
    experts=("num_local_experts",),
    epsilon=1e-5,
    theta=1e6,
    refused=_NO_BIAS,
    names={
        **_COMMON,
        **_experts(
            {
                Role.GATE: "block_sparse_moe.experts.{}.w1.weight",
                Role.UP: "block_sparse_moe.experts.{}.w3.weight",
                Role.DOWN: "block_sparse_moe.experts.{}.w2.weight",
            },
            ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
        Role.ROUTER: (StoredAs("block_sparse_moe.gate.weight"), StoredAs("mlp.gate.weight")),
    },
)

_QWEN3_MOE = Family(
    QWEN3_MOE,
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    refused={**_NO_BIAS, **_ALL_SPARSE},
)

_QWEN2_MOE = Family(
    QWEN2_MOE,
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    refused={**_ALL_SPARSE, "qkv_bias": (True,)},
    names={
        **_COMMON,
        **_EXPERTS,
        Role.SHARED_GATE: (StoredAs("mlp.shared_expert.gate_proj.weight"),),
        Role.SHARED_UP: (StoredAs("mlp.shared_expert.up_proj.weight"),),
        Role.SHARED_DOWN: (StoredAs("mlp.shared_expert.down_proj.weight"),),
    },
)

_OLMOE = Family(
    OLMOE,
    {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    expert_width="intermediate_size",
    epsilon=1e-5,
    refused=_NO_BIAS,
)

_GRANITE_MOE = Family(
    GRANITE_MOE,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "shared_intermediate_size": 0,
    },
    expert_width="intermediate_size",
    experts=("num_local_experts",),
    refused={**_NO_BIAS, "position_embedding_type": ("rope",)},
    names={
        **_COMMON,
        **_experts(
            {Role.GATE: "", Role.UP: "", Role.DOWN: ""},
            ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
            ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ),
        Role.ROUTER: (StoredAs("block_sparse_moe.router.layer.weight"), StoredAs("block_sparse_moe.router.weight")),
        Role.SHARED_GATE: (StoredAs("shared_mlp.input_linear.weight", 0),),
        Role.SHARED_UP: (StoredAs("shared_mlp.input_linear.weight", 1),),
        Role.SHARED_DOWN: (StoredAs("shared_mlp.output_linear.weight"),),
    },
)

_DEEPSEEK = Family(
    DEEPSEEK,
    {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
    },
    experts=("n_routed_experts",),
    refused={**_NO_BIAS, "moe_layer_freq": (1,), "scoring_func": ("softmax",)},
)

_GLM4_MOE = Family(
    GLM4_MOE,
    {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    experts=("n_routed_experts",),
    epsilon=1e-5,
    partial_rotary=0.5,
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "qwen2_moe": _QWEN2_MOE,
    "olmoe": _OLMOE,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "deepseek": _DEEPSEEK,
    "glm4_moe": _GLM4_MOE,
}
"""By `model_type`."""

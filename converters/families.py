"""The families of models that convert: transformers' keys, defaults and tensor names of each. Knows names only.

Keys, defaults and names are those of transformers' configuration and modelling files of the same `model_type`;
DeepSeek-MoE's are those of the code that its checkpoints bring along.
"""

from __future__ import annotations

from collections.abc import Mapping

from fiddler.converters.dbrx import DBRX_FAMILY
from fiddler.converters.family import COMMON, EXPERTS, Family, StoredAs, expert_names
from fiddler.converters.gpt_oss import GPT_OSS_FAMILY
from fiddler.models import LLAMA, MIXTRAL
from fiddler.models.architecture import Role, Scoring
from fiddler.models.deepseek import DEEPSEEK, DEEPSEEK2, GLM4_MOE
from fiddler.models.granite import GRANITE_MOE
from fiddler.models.qwen import OLMOE, QWEN2_MOE, QWEN3_MOE

__all__ = ["FAMILIES"]


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
        **COMMON,
        **expert_names(
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
        **COMMON,
        **EXPERTS,
        Role.SHARED_GATE: (StoredAs("mlp.shared_expert.gate_proj.weight"),),
        Role.SHARED_UP: (StoredAs("mlp.shared_expert.up_proj.weight"),),
        Role.SHARED_DOWN: (StoredAs("mlp.shared_expert.down_proj.weight"),),
    },
    shared_width="shared_expert_intermediate_size",
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
    clamp="clip_qkv",
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
        **COMMON,
        **expert_names(
            {Role.GATE: "", Role.UP: "", Role.DOWN: ""},
            ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
            ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ),
        Role.ROUTER: (StoredAs("block_sparse_moe.router.layer.weight"), StoredAs("block_sparse_moe.router.weight")),
        Role.SHARED_GATE: (StoredAs("shared_mlp.input_linear.weight", 0),),
        Role.SHARED_UP: (StoredAs("shared_mlp.input_linear.weight", 1),),
        Role.SHARED_DOWN: (StoredAs("shared_mlp.output_linear.weight"),),
    },
    shared_width="shared_intermediate_size",
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

_DEEPSEEK_V2 = Family(
    DEEPSEEK2,
    {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    experts=("n_routed_experts",),
    refused={
        **_NO_BIAS,
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
)

_DEEPSEEK_V3 = Family(
    DEEPSEEK2,
    {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    scoring=Scoring.SIGMOID,
    scale=2.5,
    experts=("n_routed_experts", "num_local_experts"),
    refused={
        **_NO_BIAS,
        "moe_layer_freq": (1,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "rope_interleave": (True,),
    },
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
    switches={
        "use_qk_norm": (Role.QUERY_NORM, Role.KEY_NORM),
        "attention_bias": (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS),
    },
)

_LLAMA = Family(
    LLAMA,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    windowed=False,
    refused=_NO_BIAS,
    names=COMMON,
)

_MISTRAL = Family(
    LLAMA,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    refused=_NO_BIAS,
    names=COMMON,
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "qwen2_moe": _QWEN2_MOE,
    "olmoe": _OLMOE,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": _GLM4_MOE,
    "dbrx": DBRX_FAMILY,
    "gpt_oss": GPT_OSS_FAMILY,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
}
"""By `model_type`."""

"""Configurations of every family that converts: a class of transformers, its options, how a checkpoint is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A class of transformers and its configuration; how its checkpoint is stored."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    fused: bool = False
    shard: str = "1GB"
    packed: bool = False  # experts as blocks of MXFP4


def _heads(width: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


_QWEN3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
_QWEN2 = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
_OLMOE = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40}
_GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "intermediate_size": 88,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "routed_scaling_factor": 1.5,
}

_LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "intermediate_size": 88,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
_DENSE = {"intermediate_size": 88}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}


def _dbrx(width: int, heads: int, kv_heads: int, clip: float, theta: float = 1e4, **ffn: object) -> dict[str, Any]:
    attention = {"kv_n_heads": kv_heads, "clip_qkv": clip, "rope_theta": theta}  # transformers 5.24 demands all three,
    return {
        "d_model": width,
        "n_heads": heads,
        "attn_config": attention,
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 3, "ffn_hidden_size": 40, **ffn},
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # and computes with this base
    }


def _gpt_oss(width: int, heads: int, kv_heads: int, expert_width: int, window: int) -> dict[str, Any]:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": expert_width}
    return {**_heads(width, heads, kv_heads), **experts, "head_dim": 16, "sliding_window": window}


CASES = {
    "qwen3moe": Case("Qwen3Moe", {**_heads(64, 8, 2), **_QWEN3, "head_dim": 16}),
    "qwen3moe, odd, tied, 3 shards": Case(
        "Qwen3Moe", {**_heads(50, 3, 3), **_QWEN3, "head_dim": 22, "tie_word_embeddings": True}, shard="250KB"
    ),
    "qwen3moe, f16, fused, not renormalised": Case(
        "Qwen3Moe", {**_heads(72, 4, 2), **_QWEN3, "head_dim": 24, "norm_topk_prob": False}, dtype="f16", fused=True
    ),
    "qwen2moe": Case("Qwen2Moe", {**_heads(64, 8, 2), **_QWEN2}),
    "qwen2moe, odd, tied, 3 shards": Case(
        "Qwen2Moe", {**_heads(66, 3, 3), **_QWEN2, "norm_topk_prob": True, "tie_word_embeddings": True}, shard="250KB"
    ),
    "qwen2moe, f16, fused": Case("Qwen2Moe", {**_heads(72, 6, 3), **_QWEN2}, dtype="f16", fused=True),
    "olmoe": Case("Olmoe", {**_heads(64, 4, 4), **_OLMOE}),
    "olmoe, GQA, clipped, 3 shards": Case(
        "Olmoe", {**_heads(66, 3, 1), **_OLMOE, "clip_qkv": 0.7, "rope_parameters": {"rope_theta": 5e3}}, shard="250KB"
    ),
    "olmoe, f16, fused, tied": Case(
        "Olmoe", {**_heads(72, 6, 6), **_OLMOE, "tie_word_embeddings": True}, dtype="f16", fused=True
    ),
    "granitemoe": Case("GraniteMoe", {**_heads(64, 8, 2), **_GRANITE}),
    "granitemoe, tied, 3 shards": Case(
        "GraniteMoe", {**_heads(66, 3, 3), **_GRANITE, "tie_word_embeddings": True}, shard="250KB"
    ),
    "granitemoe, shared, f16": Case(
        "GraniteMoeShared", {**_heads(72, 6, 3), **_GRANITE, "shared_intermediate_size": 56}, dtype="f16"
    ),
    "granitemoe, shared, fused": Case(
        "GraniteMoeShared", {**_heads(64, 4, 4), **_GRANITE, "shared_intermediate_size": 48}, fused=True
    ),
    "glm4moe": Case("Glm4Moe", {**_heads(64, 8, 2), **_GLM, "use_qk_norm": True, "attention_bias": True}),
    "glm4moe, 2 dense layers, groups, tied, 3 shards": Case(
        "Glm4Moe",
        {
            **_heads(50, 3, 3),
            **_GLM,
            "head_dim": 24,
            "first_k_dense_replace": 2,
            "n_group": 4,
            "topk_group": 2,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
        shard="250KB",
    ),
    "glm4moe, f16, fused, biases": Case(
        "Glm4Moe", {**_heads(72, 4, 2), **_GLM, "attention_bias": True, "n_shared_experts": 2}, dtype="f16", fused=True
    ),
    "dbrx": Case("Dbrx", _dbrx(64, 8, 2, clip=0.9, theta=5e5)),
    "dbrx, odd, 3 shards": Case("Dbrx", _dbrx(66, 3, 3, clip=2, moe_top_k=1), shard="250KB"),
    "dbrx, f16, not renormalised": Case(
        "Dbrx", _dbrx(72, 6, 1, clip=0.4, moe_normalize_expert_weights=None), dtype="f16"
    ),
    "gpt-oss, YaRN": Case(
        "GptOss", {**_gpt_oss(64, 8, 2, 40, window=16), "rope_parameters": {**_YARN, "truncate": False}}
    ),
    "gpt-oss, odd, 3 shards": Case(
        "GptOss", {**_gpt_oss(50, 3, 3, 38, window=5), "rope_parameters": _PLAIN}, shard="250KB"
    ),
    "gpt-oss, f16, YaRN truncated": Case(
        "GptOss", {**_gpt_oss(72, 6, 1, 56, window=128), "head_dim": 24, "rope_parameters": _YARN}, dtype="f16"
    ),
    "gpt-oss, MXFP4": Case("GptOss", {**_gpt_oss(64, 8, 2, 96, window=16), "rope_parameters": _YARN}, packed=True),
    "gpt-oss, MXFP4, no YaRN": Case(
        "GptOss", {**_gpt_oss(96, 4, 4, 64, window=7), "rope_parameters": _PLAIN}, packed=True
    ),
    "gpt-oss, MXFP4, wider, 3 shards": Case(
        "GptOss",
        {**_gpt_oss(256, 2, 1, 256, window=32), "head_dim": 64, "rope_parameters": {**_YARN, "truncate": False}},
        packed=True,
        shard="2MB",
    ),
    "deepseek2, V2-Lite": Case("DeepseekV2", {**_heads(64, 4, 4), **_LATENT}),
    "deepseek2, V2, groups, YaRN with mscale, 3 shards": Case(
        "DeepseekV2",
        {
            **_heads(66, 3, 3),
            **_LATENT,
            "q_lora_rank": 20,
            "kv_lora_rank": 26,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        shard="250KB",
    ),
    "deepseek2, V2, f16, fused, tied": Case(
        "DeepseekV2",
        {
            **_heads(72, 6, 6),
            **_LATENT,
            "q_lora_rank": 30,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
            "tie_word_embeddings": True,
        },
        dtype="f16",
        fused=True,
    ),
    "deepseek2, V3": Case("DeepseekV3", {**_heads(64, 4, 4), **_LATENT, "n_group": 2, "topk_group": 1}),
    "deepseek2, V3, groups, YaRN, 3 shards, tied": Case(
        "DeepseekV3",
        {
            **_heads(50, 5, 5),
            **_LATENT,
            "q_lora_rank": 20,
            "v_head_dim": 22,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "tie_word_embeddings": True,
        },
        shard="250KB",
    ),
    "deepseek2, V3, f16, fused, not renormalised": Case(
        "DeepseekV3",
        {
            **_heads(72, 6, 6),
            **_LATENT,
            "q_lora_rank": 36,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": {**_YARN, "truncate": False},
        },
        dtype="f16",
        fused=True,
    ),
    "llama, tied, RoPE of Llama 3.1": Case(
        "Llama", {**_heads(64, 8, 2), **_DENSE, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}
    ),
    "mistral, window": Case("Mistral", {**_heads(64, 8, 2), **_DENSE, "sliding_window": 16}),
    "llama, odd, f16, 2 shards, linear RoPE": Case(
        "Llama",
        {**_heads(50, 5, 5), "intermediate_size": 77, "head_dim": 14, "rope_parameters": _LINEAR},
        dtype="f16",
        shard="150KB",
    ),
    "mistral, YaRN": Case(
        "Mistral", {**_heads(66, 3, 1), **_DENSE, "sliding_window": None, "rope_parameters": _YARN}, shard="250KB"
    ),
    "mixtral, YaRN": Case("Mixtral", {**_heads(64, 4, 2), **_MIXTRAL, "head_dim": 16, "rope_parameters": _YARN}),
    "mixtral, linear RoPE": Case("Mixtral", {**_heads(64, 4, 2), **_MIXTRAL, "rope_parameters": _LINEAR}),
    "mixtral, RoPE of Llama 3.1": Case("Mixtral", {**_heads(64, 2, 2), **_MIXTRAL, "rope_parameters": _LLAMA3}),
    "qwen3moe, YaRN": Case(
        "Qwen3Moe",
        {**_heads(64, 4, 2), **_QWEN3, "head_dim": 22, "rope_parameters": {**_YARN, "attention_factor": 1.3}},
    ),
    "qwen3moe, linear RoPE": Case(
        "Qwen3Moe", {**_heads(64, 4, 2), **_QWEN3, "head_dim": 16, "rope_parameters": _LINEAR}
    ),
    "qwen3moe, RoPE of Llama 3.1": Case(
        "Qwen3Moe", {**_heads(64, 4, 2), **_QWEN3, "head_dim": 32, "rope_parameters": _LLAMA3}
    ),
    "glm4moe, YaRN": Case(
        "Glm4Moe",
        {
            **_heads(64, 4, 2),
            **_GLM,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "partial_rotary_factor": 0.5},
        },
    ),
}

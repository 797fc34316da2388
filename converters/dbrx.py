"""DBRX as a family that converts: other names of keys, which lie in objects, and of tensors. Knows names only."""

from __future__ import annotations

from fiddler.converters.family import Family, StoredAs
from fiddler.models.architecture import Role
from fiddler.models.dbrx import DBRX

__all__ = ["DBRX_FAMILY"]

DBRX_FAMILY = Family(
    DBRX,
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "moe_intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 1,
        "num_experts": 4,
    },
    keys={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
        "num_key_value_heads": "attn_config.kv_n_heads",
        "clip_qkv": "attn_config.clip_qkv",
        "moe_intermediate_size": "ffn_config.ffn_hidden_size",
        "num_experts": "ffn_config.moe_num_experts",
        "num_experts_per_tok": "ffn_config.moe_top_k",
        "norm_topk_prob": "ffn_config.moe_normalize_expert_weights",
        "hidden_act": "ffn_config.ffn_act_fn.name",
    },
    experts=("num_experts",),
    epsilon=1e-5,
    theta_keys=("rope_theta", "attn_config.rope_theta"),
    clamp="clip_qkv",
    refused={"ffn_config.moe_normalize_expert_weights": (1.0,), "tie_word_embeddings": (False,)},
    names={
        Role.ATTENTION_NORM: (StoredAs("norm_attn_norm.norm_1.weight"),),
        Role.QUERY_KEY_VALUE: (StoredAs("norm_attn_norm.attn.Wqkv.weight"),),
        Role.ATTENTION_OUTPUT: (StoredAs("norm_attn_norm.attn.out_proj.weight"),),
        Role.FFN_NORM: (StoredAs("norm_attn_norm.norm_2.weight"),),
        Role.ROUTER: (StoredAs("ffn.router.layer.weight"),),
        Role.GATE: (StoredAs("ffn.experts.mlp.w1", flat=True),),
        Role.UP: (StoredAs("ffn.experts.mlp.v1", flat=True),),
        Role.DOWN: (StoredAs("ffn.experts.mlp.w2", flat=True, transposed=True),),
    },
    layers="transformer.blocks",
    other_names={
        Role.TOKEN_EMBEDDING: "transformer.wte.weight",
        Role.OUTPUT_NORM: "transformer.norm_f.weight",
        Role.OUTPUT: "lm_head.weight",
    },
)

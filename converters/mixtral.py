"""transformers' names of a Mixtral's tensors, by their role. Knows names only."""

from __future__ import annotations

import re

from fiddler.models.architecture import Role

__all__ = ["BLOCK_NAMES", "DERIVED", "EXPERT_LETTERS", "OTHER_NAMES"]

BLOCK_NAMES = {
    Role.ATTENTION_NORM: "input_layernorm.weight",
    Role.QUERY: "self_attn.q_proj.weight",
    Role.KEY: "self_attn.k_proj.weight",
    Role.VALUE: "self_attn.v_proj.weight",
    Role.ATTENTION_OUTPUT: "self_attn.o_proj.weight",
    Role.FFN_NORM: "post_attention_layernorm.weight",
}
OTHER_NAMES = {
    Role.TOKEN_EMBEDDING: "model.embed_tokens.weight",
    Role.OUTPUT_NORM: "model.norm.weight",
    Role.OUTPUT: "lm_head.weight",
}
EXPERT_LETTERS = {Role.GATE: "w1", Role.DOWN: "w2", Role.UP: "w3"}
# Old checkpoints store this table, too; it follows from rope_theta and head_dim.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

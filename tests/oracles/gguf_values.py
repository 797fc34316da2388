"""Keys, values and tensor names at which a reader of GGUF files may stumble: for tests and for the fuzzer."""

from __future__ import annotations

from oracles.bad_gguf import boolean, f32, floats, i32, ints, text, texts, u32, u64
from oracles.small_families import GOOD

__all__ = ["KEYS", "NAMES", "VALUES", "VOCABULARY_KEYS"]

NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 31, 32, 33, 48, 64, 128, 262, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1)
REALS = (0.0, -0.0, 1e-45, 1e-6, 0.5, 1.0, -1.0, 2.5, 10000.0, 1e38, float("inf"), float("-inf"), float("nan"))
WORDS = (
    "",
    "none",
    "linear",
    "yarn",
    "longrope",
    "llama3",
    "llama",
    "gpt2",
    "qwen2",
    "deepseek-v3",
    "NFC",
    "a\0b",
    *GOOD,
)
VALUES = (
    *(kind(number) for number in NUMBERS for kind in (u32, u64)),
    *(i32(number) for number in (-1, 0, 1, -(2**31))),
    *map(f32, REALS),
    *map(text, WORDS),
    *map(boolean, (0, 1, 2)),
    *(ints([]), ints([1, 3]), ints([258] * 262), floats([0.5, float("nan")]), texts([]), texts(["a b", "b c"])),
)
KEYS = (
    *("nextn_predict_layers", "expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_count"),
    *("expert_weights_scale", "expert_weights_norm", "expert_shared_count", "expert_shared_feed_forward_length"),
    *("leading_dense_block_count", "feed_forward_length", "expert_feed_forward_length", "logit_scale"),
    *("embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv", "attention.sliding_window"),
    "attention.sliding_window_pattern",
    *("attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "expert_used_count"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast"),
)
VOCABULARY_KEYS = (
    "merges",
    "pre",
    "model",
    "token_type",
    "tokens",
    "scores",
    "eos_token_id",
    "bos_token_id",
    "eot_token_id",
)
NAMES = ("rope_freqs.weight", "blk.0.attn_kv_b.weight", "blk.0.ffn_gate.0.weight", "blk.2.nextn.eh_proj.weight")

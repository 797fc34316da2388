"""Well-formed GGUF files that are no Mixtral, or a Mixtral that cannot run; see `bad_files.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from oracles.bad_files import GATE, NORM, TOP, UP, Case, drafted, key, tensor, written
from oracles.bad_gguf import (
    F16,
    F32,
    VOCABULARY,
    D,
    Draft,
    E,
    Entry,
    F,
    boolean,
    f32,
    floats,
    i32,
    ints,
    mixtral,
    old_mixtral,
    text,
    texts,
    u32,
    u64,
    vocabulary,
)


def odd_heads(draft: Draft) -> None:
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        draft.set(f"llama.{name}", u32(15))


def without_counts(draft: Draft) -> None:
    draft.drop("llama.expert_count")
    draft.drop("llama.expert_used_count")


def a_byte_as_text(draft: Draft) -> None:
    draft.set("tokenizer.ggml.token_type", ints([2, 3, 3, 1, *[6] * 255, 1, 1, 1]))


def byte_level(name: str, says: str, **keys: bytes) -> Case:
    """The smallest Mixtral as one with byte-level BPE."""

    def change(draft: Draft) -> None:
        draft.set("tokenizer.ggml.model", text("gpt2"))
        for part, value in keys.items():
            draft.set(f"tokenizer.ggml.{part}", value)

    return drafted(f"byte_level_{name}", says, change)


def extra(name: str, added: str) -> Case:
    return drafted(name, f"{added} is not part", lambda draft: draft.entries.append(Entry(added, [D], F32)))


def vocabulary_and_embedding_differ(folder: Path) -> Path:
    draft = mixtral()
    draft.set("llama.vocab_size", u32(VOCABULARY + 1))
    for name in ("token_embd.weight", "output.weight"):
        draft.entry(name).shape[0] += 1
    return written(folder, draft.to_bytes())


def old_with(name: str, says: str, change: Callable[[Draft], object], inspectable: bool = False) -> Case:
    """The smallest Mixtral with a tensor an expert, and one change."""

    def make(folder: Path) -> Path:
        draft = old_mixtral()
        change(draft)
        return written(folder, draft.to_bytes())

    return Case(f"one_tensor_an_expert_{name}", says, make, inspectable)


def old(name: str, says: str, target: str, inspectable: bool = False, /, **changes: object) -> Case:
    """Likewise, with other attributes of a tensor's `Entry`."""
    return old_with(name, says, lambda draft: vars(draft.entry(target)).update(changes), inspectable)


UP_2 = "blk.0.ffn_up.2.weight"
OLD = [
    old("missing", f"{UP_2} is missing", UP_2, name="blk.0.ffn_up.2.weigh"),
    old("first_missing", "blk.0.ffn_gate.0.weight is missing", "blk.0.ffn_gate.0.weight", name="blk.0.ffn_gate.0.bias"),
    old("beyond_the_last", "blk.0.ffn_up.3.weight is missing", "blk.0.ffn_up.3.weight", name="blk.0.ffn_up.4.weight"),
    old("twice", f"{UP_2} appears twice", "blk.0.ffn_up.3.weight", name=UP_2),
    old("with_a_row_too_many", f"{UP_2} has shape (33, 32), the metadata imply (32, 32)", UP_2, shape=[F + 1, D]),
    old("stack_in_its_place", f"{UP_2} has shape (4, 32, 32), the metadata imply (32, 32)", UP_2, shape=[E, F, D]),
    old("of_two_types", "mix BF16 and F16", UP_2, True, kind=F16),
    old("of_float32", "mix BF16 and F32", UP_2, True, kind=F32),
    old("quantised", "mix BF16 and Q4_0", UP_2, True, kind=2, nbytes=F * D // 32 * 18),
    old_with(
        "one_too_many",
        "blk.0.ffn_up.4.weight is not part of a Mixtral",
        lambda d: d.entries.append(Entry("blk.0.ffn_up.4.weight", [F, D])),
    ),
    old_with(
        "numbered_oddly",
        "blk.0.ffn_up.02.weight is not part of a Mixtral",
        lambda d: d.entries.append(Entry("blk.0.ffn_up.02.weight", [F, D])),
    ),
    old_with(
        "and_stacks",
        f"{GATE} holds all experts of a layer, tensor blk.0.ffn_gate.0.weight a single one",
        lambda d: d.entries.append(Entry(GATE, [E, F, D])),
    ),
    old_with(
        "and_millions_more",
        "expert_count is 16000000, but there are only 22 tensors",
        lambda d: d.set("llama.expert_count", u32(16_000_000)),
    ),
    old_with("of_a_dense_model", "blk.0.ffn_gate.weight is missing", without_counts),
    tensor("one_expert_beside_stacks", f"{UP} holds all experts of a layer", GATE, name="blk.0.ffn_gate.0.weight"),
]

MODELS = [
    *OLD,
    drafted("architecture_missing", "architecture is None", lambda d: d.drop("general.architecture")),
    key("architecture_other", "architecture is 'gemma4'", "general.architecture", text("gemma4")),
    key(
        "architecture_escapes",
        r"architecture is '\x1b[2J\nerror: no'",
        "general.architecture",
        text("\x1b[2J\nerror: no"),
    ),
    key("architecture_number", "architecture is 3", "general.architecture", u32(3)),
    key("architecture_array", "architecture is an array", "general.architecture", ints([1, 2])),
    key("architecture_megabyte", "aaa...; only", "general.architecture", text("a" * 2**20)),
    drafted("experts_missing", "a Llama or Mistral has no experts", lambda d: d.drop("llama.expert_count")),
    key("experts_0", "expert_used_count is 2; a Llama or Mistral has no", "llama.expert_count", u32(0)),
    drafted("experts_of_a_dense_llama", "blk.0.ffn_gate.weight is missing", without_counts),
    key("experts_negative", "expert_count is -4", "llama.expert_count", i32(-4)),
    key("experts_most", f"expert_count is {2**32 - 1}", "llama.expert_count", u32(2**32 - 1)),
    key("experts_text", "expert_count is '8'", "llama.expert_count", text("8")),
    key("experts_true", "expert_count is True", "llama.expert_count", boolean(1)),
    key("used_more_than_there_are", "expert_used_count is 5", "llama.expert_used_count", u32(5)),
    key("used_0", "expert_used_count is 0", "llama.expert_used_count", u32(0)),
    drafted("used_missing", "expert_used_count is missing", lambda d: d.drop("llama.expert_used_count")),
    key("blocks_0", "block_count is 0", "llama.block_count", u32(0)),
    key("blocks_more_than_tensors", "block_count is 16000000", "llama.block_count", u32(16_000_000)),
    key("blocks_more_by_one", "blk.1.attn_norm.weight is missing", "llama.block_count", u32(2)),
    key("blocks_array", "block_count is an array", "llama.block_count", ints([1])),
    key("width_0", "embedding_length is 0", "llama.embedding_length", u32(0)),
    key("width_negative", "embedding_length is -32", "llama.embedding_length", i32(-32)),
    key("width_most", f"embedding_length is {TOP}", "llama.embedding_length", u64(TOP)),
    key("width_float", "embedding_length is 32.0", "llama.embedding_length", f32(32.0)),
    key("expert_width_other", "metadata imply (4, 64, 32)", "llama.feed_forward_length", u32(64)),
    key("expert_widths_array", "feed_forward_length is an array", "llama.feed_forward_length", ints([F])),
    key("heads_0", "head_count 0", "llama.attention.head_count", u32(0)),
    key("heads_not_a_multiple", "not a multiple of head_count_kv 3", "llama.attention.head_count_kv", u32(3)),
    key("kv_heads_0", "head_count_kv is 0", "llama.attention.head_count_kv", u32(0)),
    drafted("head_odd", "head_dim is 15", odd_heads),
    key("rope_of_an_odd_part", "dimension_count is 9", "llama.rope.dimension_count", u32(9)),
    key("context_0", "context_length is 0", "llama.context_length", u32(0)),
    key("epsilon_nan", "rms_epsilon is nan", "llama.attention.layer_norm_rms_epsilon", f32(float("nan"))),
    key("epsilon_negative", "rms_epsilon is -1.0", "llama.attention.layer_norm_rms_epsilon", f32(-1.0)),
    key("rope_base_nan", "freq_base is nan", "llama.rope.freq_base", f32(float("nan"))),
    key("rope_base_infinite", "freq_base is inf", "llama.rope.freq_base", f32(float("inf"))),
    key("rope_base_0", "freq_base is 0.0", "llama.rope.freq_base", f32(0.0)),
    key("rope_base_text", "freq_base is '1e6'", "llama.rope.freq_base", text("1e6")),
    key("rope_scaled", "scaling.type is 'longrope'", "llama.rope.scaling.type", text("longrope")),
    key("rope_scaling_array", "scaling.type is an array", "llama.rope.scaling.type", ints([1, 2])),
    key("rope_factor_negative", "scaling.factor is -4.0", "llama.rope.scaling.factor", f32(-4.0)),
    key("rope_scaled_the_old_way", "scaling.factor is inf", "llama.rope.scale_linear", f32(float("inf"))),
    key("attention_not_causal", "causal is False", "llama.attention.causal", boolean(0)),
    key("attention_scaled", "scale is 0.5", "llama.attention.scale", f32(0.5)),
    key("window_negative", "sliding_window is -1", "llama.attention.sliding_window", i32(-1)),
    tensor("tensor_missing", f"{GATE} is missing", GATE, name="blk.0.ffn_gate_exps.weigh"),
    tensor("tensor_with_a_row_too_many", "shape (33, 32)", "blk.0.attn_q.weight", shape=[33, 32]),
    tensor("tensor_flat", f"shape ({E * F * D},)", GATE, shape=[E * F * D]),
    tensor("experts_fewer_than_said", "shape (3, 32, 32)", GATE, shape=[E - 1, F, D]),
    drafted(
        "rope_divisors_of_another_width",
        f"rope_freqs.weight has shape ({D},)",
        lambda draft: draft.entries.append(Entry("rope_freqs.weight", [D], F32)),
    ),
    drafted(
        "rope_divisors_of_16_bits",
        "rope_freqs.weight is F16",
        lambda draft: draft.entries.append(Entry("rope_freqs.weight", [8], F16)),
    ),
    drafted(
        "rope_divisors_negative",
        "rope_freqs.weight holds a number that is not positive",
        lambda draft: draft.entries.append(Entry("rope_freqs.weight", [8], F32)),
    ),
    extra("attention_bias", "blk.0.attn_q.bias"),
    extra("layer_too_many", "blk.1.attn_norm.weight"),
    tensor("experts_of_a_type_that_does_not_run", f"{GATE} is Q8_1", GATE, True, kind=9, nbytes=E * F * D // 32 * 40),
    tensor("integers_for_a_norm", f"{NORM} is I32", NORM, True, kind=26, nbytes=4 * D),
    # The vocabulary.
    key("tokens_fewer", "261 tokens", "tokenizer.ggml.tokens", texts(vocabulary()[:-1])),
    key("scores_fewer", "scores has 3 entries for 262", "tokenizer.ggml.scores", floats([0.0] * 3)),
    key("types_more", "token_type has 263 entries", "tokenizer.ggml.token_type", ints([1] * (VOCABULARY + 1))),
    key("vocabulary_larger", f"shape ({VOCABULARY}, {D})", "llama.vocab_size", u32(VOCABULARY + 1)),
    key("bos_out_of_range", "bos_token_id is 262", "tokenizer.ggml.bos_token_id", u32(VOCABULARY)),
    key("eos_negative", "eos_token_id is -1", "tokenizer.ggml.eos_token_id", i32(-1)),
    key("eos_text", "eos_token_id is '</s>'", "tokenizer.ggml.eos_token_id", text("</s>")),
    key("tokenizer_other", "tokenizer.ggml.model is 'bert'", "tokenizer.ggml.model", text("bert")),
    key("tokenizer_without_a_pre_tokenizer", "tokenizer.ggml.pre is None", "tokenizer.ggml.model", text("gpt2")),
    byte_level("pre_other", "tokenizer.ggml.pre is 'superbpe'", pre=text("superbpe"), merges=texts([])),
    byte_level("pre_array", "tokenizer.ggml.pre is ", pre=ints([1, 2]), merges=texts([])),
    byte_level("merges_missing", "tokenizer.ggml.merges is None", pre=text("qwen2")),
    byte_level("merges_of_numbers", "tokenizer.ggml.merges is ", pre=text("qwen2"), merges=ints([1, 2])),
    byte_level("bytes_missing", "lacks tokens for", pre=text("qwen2"), merges=texts([])),
    key("tokenizer_array", "tokenizer.ggml.model is ", "tokenizer.ggml.model", ints([1, 2])),
    key("prefix_rule_array", "prepend_scheme is ", "fiddler.tokenizer.prepend_scheme", ints([1, 2])),
    drafted("tokens_missing", "tokenizer.ggml.tokens is None", lambda d: d.drop("tokenizer.ggml.tokens")),
    key(
        "score_nan", "scores holds nan for token 1", "tokenizer.ggml.scores", floats([0.0, float("nan")] + [0.0] * 260)
    ),
    Case("tokens_and_embedding_differ", "holds 262 tokens, llama.vocab_size says 263", vocabulary_and_embedding_differ),
    drafted("bytes_missing", "lacks 1 of the 256 byte tokens", a_byte_as_text, True),
]

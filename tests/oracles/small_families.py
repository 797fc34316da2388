"""The smallest model of every family: its hyper-parameters, and its file as a draft whose bytes a test can change."""

from __future__ import annotations

from dataclasses import replace

from fiddler.models import ARCHITECTURES, LLAMA
from fiddler.models.architecture import FLOATS, Role, RouterRule, Scoring
from fiddler.models.config import Config, LatentWidths
from fiddler.models.metadata import to_metadata
from fiddler.models.rope_scaling import RopeKind, RopeScaling
from oracles import bad_gguf
from oracles.bad_gguf import F32, VOCABULARY, Draft, Entry, boolean, f32, ints, text, texts, u32

__all__ = ["GOOD", "byte_level_vocabulary", "drafted"]

PLAIN = Config(ARCHITECTURES["qwen3moe"], 4096, 128, 32, 2, 16, 4, 2, 8, 6, 2, 1e-6, 1e4)
DENSE = {"feed_forward_length": 48, "leading_dense_block_count": 1, "expert_shared_feed_forward_length": 16}
GOOD = {
    "qwen3moe": PLAIN,
    "qwen2moe": replace(PLAIN, architecture=ARCHITECTURES["qwen2moe"], router=RouterRule(renormalise=False),
                        expert_shared_feed_forward_length=24),
    "olmoe": replace(PLAIN, architecture=ARCHITECTURES["olmoe"], router=RouterRule(renormalise=False), clamp_kqv=2.0),
    "granitemoe": replace(PLAIN, architecture=ARCHITECTURES["granitemoe"], expert_shared_feed_forward_length=24,
                          attention_scale=0.5, embedding_scale=12.0, residual_scale=0.25, logit_scale=8.0),
    "deepseek": replace(PLAIN, architecture=ARCHITECTURES["deepseek"], router=RouterRule(renormalise=False), **DENSE),
    "glm4moe": replace(PLAIN, architecture=ARCHITECTURES["glm4moe"], rope_dimension_count=4, **DENSE,
                       router=RouterRule(Scoring.SIGMOID, scale=1.5, groups=3, groups_used=2)),
    "deepseek2": Config(ARCHITECTURES["deepseek2"], 4096, 128, 32, 2, 16, 4, 1, 20, 6, 2, 1e-6, 1e4, **DENSE,
                        rope_dimension_count=4, latent=LatentWidths(latent=16, key=12, value=6, query=10),
                        router=RouterRule(Scoring.SIGMOID, scale=2.5, groups=3, groups_used=2),
                        absent=frozenset((Role.QUERY, Role.KEY_VALUE_UP))),
    "dbrx": replace(PLAIN, architecture=ARCHITECTURES["dbrx"], clamp_kqv=8.0),
    "gpt-oss": replace(PLAIN, architecture=ARCHITECTURES["gpt-oss"], sliding_window=12),
    "llama": Config(LLAMA, 4096, 128, 32, 2, 0, 4, 2, 8, 0, 0, 1e-6, 1e4, sliding_window=12, feed_forward_length=48,
                    leading_dense_block_count=2),
}  # fmt: skip

_WRITERS = {bool: boolean, int: u32, float: f32, str: text}


def drafted(family: str, *, byte_level: bool = False) -> Draft:
    """A file of the family's model, with YaRN, and with a vocabulary of either kind."""
    scaling = RopeScaling(RopeKind.YARN, 4.0, 64)
    config = replace(GOOD[family], vocab_size=VOCABULARY, rope_scaling=scaling)
    smallest = bad_gguf.mixtral()
    pairs = [("general.architecture", text(family))]
    pairs += [(key, _WRITERS[type(value)](value)) for key, value in to_metadata(config).items()]
    pairs += (
        byte_level_vocabulary() if byte_level else [pair for pair in smallest.pairs if "tokenizer." in str(pair[0])]
    )
    entries = [
        Entry(name, list(config.shape(tensor)), F32 if tensor.role in FLOATS else bad_gguf.BF16)
        for name, tensor in config.tensors(tied=False).items()
    ]
    return Draft([*pairs], entries)


def byte_level_vocabulary() -> list[tuple[str, bytes]]:
    """Keys of a byte-level vocabulary: the letters of all bytes, two merges, four special tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]
    names = [*letters, "ab", "abc", "<|a|>", "<|b|>", "<think>", "</s>"]
    assert len(names) == VOCABULARY
    return [
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("qwen2")),
        ("tokenizer.ggml.tokens", texts(names)),
        ("tokenizer.ggml.token_type", ints([1] * 258 + [3, 3, 4, 3])),
        ("tokenizer.ggml.merges", texts(["a b", "ab c"])),
        ("tokenizer.ggml.eos_token_id", u32(261)),
        ("tokenizer.ggml.bos_token_id", u32(258)),
        ("tokenizer.ggml.add_bos_token", boolean(0)),
        ("fiddler.tokenizer.normalizer", text("NFC")),
        ("fiddler.tokenizer.ignore_merges", boolean(1)),
    ]

"""RoPE scaling in GGUF metadata, under llama.cpp's keys: reads and writes `RopeScaling`.

YaRN's factor of queries and keys is `yarn_attn_factor`, as llama.cpp's converter writes it; llama.cpp itself computes
it, and multiplies it by `attn_factor`. DeepSeek's `yarn_log_multiplier` is a tenth of `mscale_all_dim`
(https://github.com/ggml-org/llama.cpp/pull/17945). Scaling by divisors is a tensor, and has no keys.
"""

from __future__ import annotations

from fiddler.errors import FileFormatError, quoted
from fiddler.models.architecture import ROPE_DIVISORS, Architecture, AttentionKind
from fiddler.models.metadata_keys import MetadataKeys
from fiddler.models.rope_scaling import RopeKind, RopeScaling, yarn_attention_factor

__all__ = ["read_rope_scaling", "rope_scaling_metadata", "truncate_metadata"]

TRUNCATE_KEY = "fiddler.rope.yarn_truncate"
"""A key of ours: llama.cpp always truncates."""
_NOT_TRUNCATED = ("gpt-oss",)  # architectures whose files without that key are of models trained without truncation
_KINDS = {"linear": RopeKind.LINEAR, "yarn": RopeKind.YARN}


def read_rope_scaling(keys: MetadataKeys, *, divisors: bool, context: int) -> RopeScaling | None:
    """The scaling that the keys describe. divisors: the file has the tensor of them. context: `context_length`.

    Raises FileFormatError for a kind that does not run.
    """
    kind = keys.value("rope.scaling.type", "linear")  # llama.cpp's default: no type and a factor
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    if not isinstance(kind, str) or kind not in (*_KINDS, "none"):
        raise FileFormatError(
            f"{keys.prefix}.rope.scaling.type is {quoted(kind)}; only 'none', 'linear' and 'yarn' run"
        )
    extrapolation = keys.real("rope.scaling.yarn_ext_factor", 1.0)
    if kind == "yarn" and extrapolation != 1.0:
        raise FileFormatError(f"{keys.prefix}.rope.scaling.yarn_ext_factor is {extrapolation}; only 1 runs")
    attention_factor = keys.real("rope.scaling.attn_factor", 0.0) or 1.0
    if divisors:
        if factor != 1.0 and kind != "none":
            raise FileFormatError(f"the file has {ROPE_DIVISORS.name} and a rope.scaling.factor; one of them runs")
        return RopeScaling(RopeKind.DIVISORS, attention_factor=attention_factor)
    if kind != "yarn":
        plain = factor if kind == "linear" else 1.0
        return None if plain == attention_factor == 1.0 else RopeScaling(RopeKind.LINEAR, plain, 0, attention_factor)
    if factor == attention_factor == 1.0 and "rope.scaling.yarn_attn_factor" not in keys:
        return None
    multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0) * 10.0
    default = 1.0 if multiplier else yarn_attention_factor(factor)
    return RopeScaling(
        RopeKind.YARN,
        factor,
        keys.integer("rope.scaling.original_context_length", context),
        keys.real("rope.scaling.yarn_attn_factor", default * attention_factor),
        keys.real("rope.scaling.yarn_beta_fast", 32.0),
        keys.real("rope.scaling.yarn_beta_slow", 1.0),
        keys.whole_key_boolean(TRUNCATE_KEY, keys.prefix not in _NOT_TRUNCATED),
        round(multiplier, 7),  # a float32 of a decimal fraction
    )


def rope_scaling_metadata(scaling: RopeScaling | None, architecture: Architecture) -> dict[str, str | int | float]:
    """The keys that `read_rope_scaling` reads; `TRUNCATE_KEY` is `truncate_metadata`'s."""
    if scaling is None or scaling.kind is RopeKind.DIVISORS:
        return {}
    values: dict[str, str | int | float] = {
        "rope.scaling.type": scaling.kind.value,
        "rope.scaling.factor": float(scaling.factor),
    }
    if scaling.kind is RopeKind.LINEAR:
        return (
            values
            if scaling.attention_factor == 1.0
            else values | {"rope.scaling.attn_factor": scaling.attention_factor}
        )
    values["rope.scaling.original_context_length"] = scaling.original_context_length
    values["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
    values["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    if scaling.log_multiplier:
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.log_multiplier
    default = 1.0 if scaling.log_multiplier else yarn_attention_factor(scaling.factor)
    if scaling.attention_factor != default:
        values["rope.scaling.yarn_attn_factor"] = scaling.attention_factor
        if architecture.attention is AttentionKind.HEADS:  # llama.cpp would scale a latent's scores by it, too
            values["rope.scaling.attn_factor"] = scaling.attention_factor / default
    return values


def truncate_metadata(scaling: RopeScaling | None, architecture: Architecture) -> dict[str, bool]:
    """`TRUNCATE_KEY`, where it is not what a file without it means."""
    if scaling is None or scaling.kind is not RopeKind.YARN:
        return {}
    default = architecture.gguf_name not in _NOT_TRUNCATED
    return {} if scaling.truncate is default else {TRUNCATE_KEY: scaling.truncate}

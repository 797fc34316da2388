"""A model's hyper-parameters in GGUF metadata: reads and writes `Config`, under llama.cpp's keys. No files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fiddler.errors import FileFormatError, quoted
from fiddler.models import ARCHITECTURES, DENSE_ARCHITECTURES, MIXTRAL
from fiddler.models.architecture import (
    ROPE_DIVISORS,
    Architecture,
    AttentionKind,
    DenseLayers,
    Role,
    RouterRule,
    Scoring,
    SharedExperts,
    Window,
)
from fiddler.models.config import Config, LatentWidths
from fiddler.models.dbrx import DBRX
from fiddler.models.metadata_keys import MetadataKeys
from fiddler.models.rope_metadata import read_rope_scaling, rope_scaling_metadata, truncate_metadata

__all__ = ["further_tensors", "read_config", "to_metadata"]

_NEXTN = "nextn_predict_layers"
_SCORINGS = {1: Scoring.SOFTMAX, 2: Scoring.SIGMOID}  # `expert_gating_func`, as in gguf's ExpertGatingFuncType
# keys and attributes of the multipliers, which Granite alone has; 0 is none, as in llama.cpp
_SCALES = {
    "attention.scale": "attention_scale",
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
}


def read_config(metadata: Mapping[str, object], tensors: Collection[str]) -> Config:
    """Read the hyper-parameters from a GGUF's metadata. tensors: the names in the file; they tell optional tensors.

    Raises FileFormatError where a key is missing, of another type or out of range, where the architecture is not a
    known one or lacks its experts, and where attention or RoPE are of a kind that does not run.
    """
    architecture, keys = _architecture(metadata)
    tensors = set(tensors) - further_tensors(metadata, tensors)
    _reject_unsupported(metadata, architecture)
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if heads < 1 or width < 1:
        raise FileFormatError(f"embedding_length is {width} and attention.head_count {heads}; both must be positive")
    latent = _latent(keys, architecture, heads)
    head_dim, kv_heads = _head_dim(keys, width // heads, latent), keys.integer("attention.head_count_kv", heads)
    experts, feed_forward = architecture.has_experts, keys.integer("feed_forward_length")
    expert_width, layers = keys.integer("expert_feed_forward_length", feed_forward * experts), _block_count(keys)
    rotated, context = keys.integer("rope.dimension_count", head_dim), keys.integer("context_length")
    scales = {name: keys.real(key, 0.0) for key, name in _SCALES.items() if architecture.scaled}
    return Config(
        architecture,
        vocab_size=keys.integer("vocab_size", _token_count(metadata)),
        context_length=context,
        embedding_length=width,
        block_count=layers,
        expert_feed_forward_length=expert_width,
        head_count=heads,
        head_count_kv=kv_heads if latent is None else 1,  # files from before 2025 have the heads' number
        head_dim=head_dim,
        expert_count=keys.integer("expert_count", 0),
        expert_used_count=keys.integer("expert_used_count", None if experts else 0),
        rms_epsilon=keys.real(f"attention.{architecture.norm.epsilon_key}"),
        rope_freq_base=keys.real("rope.freq_base", 10000.0),
        sliding_window=_window(keys, architecture),
        router=_router(keys, architecture, biased=any(".exp_probs_b." in name for name in tensors)),
        rope_dimension_count=None if rotated == head_dim else rotated,
        feed_forward_length=0 if architecture.dense_layers is DenseLayers.NONE else feed_forward,
        leading_dense_block_count=keys.integer("leading_dense_block_count", 0) if experts else layers,
        expert_shared_feed_forward_length=_shared_width(keys, architecture, expert_width),
        absent=_absent(architecture, tensors),
        clamp_kqv=keys.real("attention.clamp_kqv", 0.0) or None,
        rope_scaling=read_rope_scaling(keys, divisors=ROPE_DIVISORS.name in tensors, context=context),
        latent=latent,
        **{name: value for name, value in scales.items() if value},  # 0: none, as in llama.cpp
    )


def further_tensors(metadata: Mapping[str, object], tensors: Iterable[str]) -> set[str]:
    """Those of `tensors` that are in blocks after the model's, which predict further tokens and are not computed.

    GLM-4.5's and DeepSeek-V3's multi-token prediction; such blocks count in `block_count` and stand last.
    Raises FileFormatError where the key's number of them makes no sense.
    """
    keys = MetadataKeys(metadata, str(metadata.get("general.architecture")))
    if _NEXTN not in keys:
        return set()
    end = keys.integer("block_count")
    blocks = range(_block_count(keys), end)
    numbers = ((name, name.split(".")[1]) for name in tensors if name.startswith("blk.") and name.count(".") > 1)
    return {
        name
        for name, number in numbers
        if number.isascii() and number.isdecimal() and len(number) < 10 and int(number) in blocks
    }


def to_metadata(config: Config) -> dict[str, str | int | float | bool]:
    """The keys that `read_config` reads; store `int` values as uint32, `float` values as float32."""
    prefix, default = config.architecture.gguf_name, config.architecture.router
    values: dict[str, str | int | float | bool] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.embedding_length,
        "block_count": config.block_count,
        "feed_forward_length": config.feed_forward_length or config.expert_feed_forward_length,
        "attention.head_count": config.head_count,
        "attention.head_count_kv": config.head_count_kv,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotated,
        f"attention.{config.architecture.norm.epsilon_key}": float(config.rms_epsilon),
        "rope.freq_base": float(config.rope_freq_base),
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    if config.architecture.has_experts:
        values |= {"expert_count": config.expert_count, "expert_used_count": config.expert_used_count}
        if config.architecture is not MIXTRAL:  # where llama.cpp knows the other key only
            values["expert_feed_forward_length"] = config.expert_feed_forward_length
    if config.architecture.dense_layers is DenseLayers.LEADING:
        values["leading_dense_block_count"] = config.leading_dense_block_count
    if config.expert_shared_feed_forward_length:
        values["expert_shared_feed_forward_length"] = config.expert_shared_feed_forward_length
        if config.architecture.shared_experts is SharedExperts.ADDED:
            values["expert_shared_count"] = (
                config.expert_shared_feed_forward_length // config.expert_feed_forward_length
            )
    values |= _router_metadata(config.router, default)
    for key, name in _SCALES.items():
        value = getattr(config, name)
        if config.architecture.scaled and value is not None:
            values[key] = float(value)
    if config.clamp_kqv is not None or config.architecture is DBRX:  # where llama.cpp demands the key; 0: none
        values["attention.clamp_kqv"] = float(config.clamp_kqv or 0.0)
    if config.latent is not None:
        values |= {
            "attention.value_length": config.latent.latent,
            "attention.q_lora_rank": config.latent.query,  # 0 for llama.cpp, which looks for it
            "attention.kv_lora_rank": config.latent.latent,
            "attention.key_length_mla": config.latent.key,
            "attention.value_length_mla": config.latent.value,
        }
    values |= rope_scaling_metadata(config.rope_scaling, config.architecture)
    named: dict[str, str | int | float | bool] = {f"{prefix}.{key}": value for key, value in values.items()}
    return named | truncate_metadata(config.rope_scaling, config.architecture)


def _architecture(metadata: Mapping[str, object]) -> tuple[Architecture, MetadataKeys]:
    """The architecture that a GGUF names, and its keys. Of two with one name, `expert_count` tells which it is."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        rows = (*ARCHITECTURES.values(), *DENSE_ARCHITECTURES.values())
        known = ", ".join(f"{each.name} ({each.gguf_name!r})" for each in rows)
        raise FileFormatError(f"general.architecture is {quoted(name)}; only {known} runs")
    keys = MetadataKeys(metadata, name)
    if keys.integer("expert_count", 0):
        return ARCHITECTURES[name], keys
    if name not in DENSE_ARCHITECTURES:
        raise FileFormatError(f"{name}.expert_count is missing or 0: a dense model, not a mixture of experts")
    return DENSE_ARCHITECTURES[name], keys


def _latent(keys: MetadataKeys, architecture: Architecture, heads: int) -> LatentWidths | None:
    """The widths of latent attention. Files from before 2025 have a head's where newer ones have the latent's."""
    if architecture.attention is AttentionKind.HEADS:
        return None
    old = "" if "attention.key_length_mla" not in keys else "_mla"
    if (kv_heads := keys.integer("attention.head_count_kv", heads)) not in (1, heads):
        raise FileFormatError(f"{keys.prefix}.attention.head_count_kv is {kv_heads}; a latent has 1, or {heads} heads")
    return LatentWidths(
        latent=keys.integer("attention.kv_lora_rank"),
        key=keys.integer(f"attention.key_length{old}"),
        value=keys.integer(f"attention.value_length{old}"),
        query=keys.integer("attention.q_lora_rank", 0),
    )


def _head_dim(keys: MetadataKeys, default: int, latent: LatentWidths | None) -> int:
    """Width of a head's key and of its value, which are the same; of a latent and a rotated key."""
    if latent is not None:
        width = latent.latent + keys.integer("rope.dimension_count")
        if "attention.key_length_mla" in keys and keys.integer("attention.key_length", width) != width:
            raise FileFormatError(
                f"{keys.prefix}.attention.key_length is {keys.integer('attention.key_length')}; kv_lora_rank and "
                f"rope.dimension_count make {width}"
            )
        return width
    head_dim = keys.integer("attention.key_length", default)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise FileFormatError(
            f"{keys.prefix}.attention.value_length is {keys.integer('attention.value_length')}, but a head is "
            f"{head_dim} wide: the two must be the same"
        )
    return head_dim


def _router(keys: MetadataKeys, architecture: Architecture, *, biased: bool) -> RouterRule:
    """biased: the file has selection biases, which transformers adds to sigmoids only."""
    default = architecture.router
    number = keys.integer("expert_gating_func", 0)
    if number and number not in _SCORINGS:
        raise FileFormatError(f"{keys.prefix}.expert_gating_func is {number}; only 1 (softmax) and 2 (sigmoid) run")
    return RouterRule(
        scoring=_SCORINGS.get(number, Scoring.SIGMOID if biased else default.scoring),
        renormalise=keys.boolean("expert_weights_norm", default.renormalise),
        scale=keys.real("expert_weights_scale", 0.0) or 1.0,
        groups=keys.integer("expert_group_count", 0) or 1,
        groups_used=keys.integer("expert_group_used_count", 0) or 1,
    )


def _router_metadata(rule: RouterRule, default: RouterRule) -> dict[str, int | float | bool]:
    values: dict[str, int | float | bool] = {}
    if rule.scoring is not default.scoring or default.scoring is not Scoring.SOFTMAX:
        values["expert_gating_func"] = next(number for number, each in _SCORINGS.items() if each is rule.scoring)
    if rule.renormalise != default.renormalise or default.scoring is not Scoring.SOFTMAX:
        values["expert_weights_norm"] = rule.renormalise
    if rule.scale != 1.0:
        values["expert_weights_scale"] = float(rule.scale)
    if rule.groups > 1:
        values |= {"expert_group_count": rule.groups, "expert_group_used_count": rule.groups_used}
    return values


def _shared_width(keys: MetadataKeys, architecture: Architecture, expert_width: int) -> int:
    """The shared experts' joint width: a key of its own, or their number."""
    if architecture.shared_experts is SharedExperts.NONE:
        return 0
    return keys.integer("expert_shared_feed_forward_length", keys.integer("expert_shared_count", 0) * expert_width)


def _window(keys: MetadataKeys, architecture: Architecture) -> int | None:
    """Positions; None where there is no window. llama.cpp ignores the key for Mixtral, transformers does not."""
    if architecture.window is Window.EVERY_SECOND:
        pattern: Any = keys.value("attention.sliding_window_pattern", 2)
        pattern = pattern.tolist() if hasattr(pattern, "tolist") else pattern  # one number, or one a layer
        listed = isinstance(pattern, list) and len(pattern) == _block_count(keys)
        if pattern != 2 and not (listed and pattern == [layer % 2 == 0 for layer in range(len(pattern))]):
            raise FileFormatError(
                f"{keys.prefix}.attention.sliding_window_pattern is {quoted(pattern)}; only 2, a window on the first "
                "of each two layers, runs"
            )
        return keys.integer("attention.sliding_window")
    return None if architecture.window is Window.NONE else keys.integer("attention.sliding_window", 0) or None


def _block_count(keys: MetadataKeys) -> int:
    """Layers without those that predict further tokens."""
    count, further = keys.integer("block_count"), keys.integer(_NEXTN, 0)
    if further and not 0 <= further < count:
        raise FileFormatError(f"{keys.prefix}.{_NEXTN} is {further}; it must lie between 0 and {count - 1}")
    return count - further


def _absent(architecture: Architecture, tensors: Collection[str]) -> frozenset[Role]:
    """The roles of optional tensors of which the file has none at all."""
    present = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.") and name.count(".") >= 2}
    return frozenset(each.role for each in architecture.block if each.optional and each.name not in present)


def _reject_unsupported(metadata: Mapping[str, object], architecture: Architecture) -> None:
    """Reject options of llama.cpp (`llama_model::load_hparams`) that no architecture here has."""
    prefix = architecture.gguf_name
    supported: dict[str, tuple[object, ...]] = {"attention.causal": (True,), "attention.temperature_scale": (0.0,)}
    if not architecture.scaled:
        supported["attention.scale"] = (0.0,)
    for key, allowed in supported.items():
        value = metadata.get(f"{prefix}.{key}")
        if value is not None and not (isinstance(value, (int, float, str)) and value in allowed):
            raise FileFormatError(f"{prefix}.{key} is {quoted(value)}; only plain attention runs")


def _token_count(metadata: Mapping[str, object]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None

"""Reads the rotary embedding from config.json: its base, the rotated part of a head, and its scaling.

Keys and defaults are those of transformers' `modeling_rope_utils.py`, at top level or in `rope_scaling` (version 4), or
in `rope_parameters` (version 5).
"""

from __future__ import annotations

import math

from fiddler.converters.hf_keys import HfKeys
from fiddler.errors import FileFormatError, quoted
from fiddler.models.architecture import AttentionKind
from fiddler.models.rope_scaling import RopeKind, RopeScaling, llama3_divisors, yarn_attention_factor

__all__ = ["partial_rotary", "rope_scaling", "rope_theta"]

_GROUPS = ("rope_parameters", "rope_scaling")
_KEYS = {  # beside the base and the kind
    "default": ("factor", "attention_factor", "mscale", "mscale_all_dim"),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        *("mscale", "mscale_all_dim"),
    ),
}
_EVERYWHERE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def rope_theta(keys: HfKeys) -> float:
    """The base of RoPE; raises CheckpointError where two keys give different ones."""
    bases = {base for group in _groups(keys) if (base := group.optional_real("rope_theta")) is not None}
    bases |= {base for key in keys.family.theta_keys if (base := keys.optional_real(key)) is not None}
    if len(bases) > 1:
        raise keys.error(f"rope_theta has the values {sorted(bases)}; keep the right one")
    return bases.pop() if bases else keys.family.theta


def partial_rotary(keys: HfKeys) -> float:
    """The part of a head that is rotated."""
    key, whole = "partial_rotary_factor", keys.family.partial_rotary == 1.0
    for name in (*_GROUPS, None):
        values = keys.values if name is None else keys.values.get(name)
        if not isinstance(values, dict) or values.get(key) is None:
            continue
        shown = key if name is None else f"{name}.{key}"
        if whole and values[key] != 1:
            architecture = keys.family.architecture.name
            raise keys.error(f"{shown} is {quoted(values[key], 40)}; a {architecture} rotates whole heads")
        factor = HfKeys(keys.path, values, keys.family).optional_real(key)
        if factor is None or not 0 < factor <= 1:
            raise keys.error(f"{shown} is {quoted(factor, 40)}; it must lie between 0 and 1")
        return factor
    return keys.family.partial_rotary


def rope_scaling(keys: HfKeys, rotated: int, context: int) -> RopeScaling | None:
    """How RoPE is scaled; None: not at all. rotated: elements of a head. context: `max_position_embeddings`.

    Raises CheckpointError for a kind that does not run, and for a key that its kind does not have.
    """
    found = [_one(keys, group, rotated, context) for group in _groups(keys)]
    if len(set(found)) > 1:  # transformers takes one of them, and forgets the other's base
        raise keys.error("rope_parameters and rope_scaling differ; keep the right one")
    return found[0] if found else None


def _groups(keys: HfKeys) -> list[HfKeys]:
    groups = []
    for name in _GROUPS:
        values = keys.values.get(name)
        if values is None:
            continue
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            raise keys.error(f"{name} is {quoted(values, 60)}; one RoPE for all layers converts")
        groups.append(HfKeys(keys.path, values, keys.family))
    if not groups and keys.family.rope:
        groups.append(HfKeys(keys.path, keys.family.rope, keys.family))
    return groups


def _one(keys: HfKeys, group: HfKeys, rotated: int, context: int) -> RopeScaling | None:
    values = group.values
    kind = values.get("rope_type", values.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise keys.error(f"rope_type is {quoted(kind, 40)}; only {', '.join(map(repr, _KEYS))} convert")
    for key, value in values.items():
        if value is not None and key not in (*_KEYS[kind], *_EVERYWHERE):
            raise keys.error(f"RoPE's {quoted(key, 40)} is {quoted(value, 40)}; {kind!r} has no such key")
    if kind == "default":
        for key in _KEYS[kind]:
            if values.get(key) not in (None, 1):
                raise keys.error(f"RoPE's {key} is {quoted(values[key], 40)}, but its rope_type is {kind!r}")
        return None
    try:
        return _scaled(keys, group, kind, rotated, context)
    except FileFormatError as error:
        raise keys.error(str(error)) from None


def _scaled(keys: HfKeys, group: HfKeys, kind: str, rotated: int, context: int) -> RopeScaling | None:
    original = keys.optional_integer("original_max_position_embeddings")
    if original is None:
        original = group.optional_integer("original_max_position_embeddings") or context
    factor = group.optional_real("factor")
    if factor is None and kind == "yarn":
        factor = context / original if original > 0 else 0.0
    if factor is None:
        raise keys.error(f"RoPE's factor is missing; a rope_type of {kind!r} needs it")
    if kind == "linear":
        return None if factor == 1 else RopeScaling(RopeKind.LINEAR, factor)
    if kind == "llama3":
        return None if factor == 1 else _llama3(keys, group, factor, rotated, original)
    return _yarn(keys, group, factor, original)


def _yarn(keys: HfKeys, group: HfKeys, factor: float, original: int) -> RopeScaling | None:
    mscale, mscale_all_dim = group.optional_real("mscale"), group.optional_real("mscale_all_dim")
    attention_factor = group.optional_real("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    latent = keys.family.architecture.attention is AttentionKind.LATENT
    if factor == attention_factor == 1:
        return None
    return RopeScaling(
        RopeKind.YARN,
        factor,
        original,
        attention_factor,
        group.optional_real("beta_fast") or 32.0,
        group.optional_real("beta_slow") or 1.0,
        group.boolean("truncate", True),
        (mscale_all_dim or 0.0) if latent else 0.0,
    )


def _llama3(keys: HfKeys, group: HfKeys, factor: float, rotated: int, original: int) -> RopeScaling:
    low, high = group.optional_real("low_freq_factor"), group.optional_real("high_freq_factor")
    if low is None or high is None or not 0 < low <= high or factor <= 0:
        raise keys.error(f"RoPE's factors are {factor}, {low} and {high}; 'llama3' needs rising positive frequencies")
    base = rope_theta(keys)
    if not (math.isfinite(base) and base > 0):
        raise keys.error(f"rope_theta is {base}; it must be positive")
    frequencies = [base ** -(2 * pair / rotated) for pair in range(rotated // 2)]
    return RopeScaling(RopeKind.DIVISORS, divisors=llama3_divisors(frequencies, factor, low, high, original))

"""Reads a Hugging Face folder's config.json as `Config`. Knows transformers' keys and defaults; opens no weights.

The keys are those of transformers' configuration classes, versions 4 and 5. A key that would change the model's
arithmetic and has no equivalent in the GGUF is refused by name, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fiddler.converters.families import FAMILIES, Family
from fiddler.converters.json_object import read_object
from fiddler.errors import CheckpointError, FileFormatError, quoted
from fiddler.models import MIXTRAL
from fiddler.models.architecture import DenseLayers, Role, Scoring, SharedExperts, Window
from fiddler.models.config import Config
from fiddler.models.deepseek import GLM4_MOE
from fiddler.models.granite import GRANITE_MOE
from fiddler.models.qwen import OLMOE, QWEN2_MOE

__all__ = ["HfConfig", "read_hf_config"]

_MOST_FURTHER_LAYERS = 64
_MULTIPLIERS = {  # attributes of `Config`, and Granite's keys
    "attention_scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_LARGEST_REAL, _SMALLEST_REAL = 3.4e38, 1.4e-45
_IDENTITY = ("linear", "yarn", "llama3")  # scalings that a factor of 1 makes none


@dataclass(frozen=True)
class HfConfig:
    """The hyper-parameters in config.json; `tied`: it says that `token_embd` is the output matrix, too.

    `ignored_layers`: layers after the model's own, which predict further tokens.
    """

    family: Family
    config: Config
    tied: bool
    ignored_layers: range


def read_hf_config(folder: Path) -> HfConfig:
    """Read `folder`/config.json. Raises CheckpointError for a family that does not convert, or quantised weights."""
    path = folder / "config.json"
    values = read_object(path, "give the folder of a Hugging Face checkpoint")
    keys = _Keys(path, values, _family(path, values))
    keys.refuse_unsupported()
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim, kv_heads = keys.optional_integer("head_dim"), keys.optional_integer("num_key_value_heads")
    if head_dim is None and (heads < 1 or width % heads):
        raise keys.error(f"hidden_size {width} over num_attention_heads {heads} is not an integer; set head_dim")
    head_dim = width // heads if head_dim is None else head_dim
    layers = keys.integer("num_hidden_layers")
    rotated = keys.partial_rotary() * head_dim
    try:
        config = Config(
            keys.family.architecture,
            vocab_size=keys.integer("vocab_size"),
            context_length=keys.integer("max_position_embeddings"),
            embedding_length=width,
            block_count=layers,
            expert_feed_forward_length=keys.integer(keys.family.expert_width),
            head_count=heads,
            head_count_kv=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            expert_count=keys.integer(keys.first_present(keys.family.experts)),
            expert_used_count=keys.integer("num_experts_per_tok"),
            rms_epsilon=keys.real("rms_norm_eps", keys.family.epsilon),
            rope_freq_base=keys.rope_theta(),
            rope_dimension_count=None if rotated == head_dim else int(rotated),
            **_parts(keys),
        )
    except FileFormatError as error:
        raise keys.error(str(error)) from None
    further = keys.optional_integer("num_nextn_predict_layers") or keys.optional_integer("num_mtp_layers") or 0
    ignored = range(layers, layers + max(0, min(further, _MOST_FURTHER_LAYERS)))
    return HfConfig(keys.family, config, keys.boolean("tie_word_embeddings", False), ignored)


def _family(path: Path, values: Mapping[str, object]) -> Family:
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    named = "" if kind else f" (architectures: {quoted(values.get('architectures'), 60)})"
    known = ", ".join(repr(each) for each in FAMILIES)
    raise CheckpointError(f"{path}: model_type is {quoted(kind, 40)}{named}; only {known} convert")


def _parts(keys: _Keys) -> dict[str, Any]:
    """The fields of `Config` that only some architectures have."""
    architecture, fields = keys.family.architecture, dict[str, Any]()
    has = {tensor.role for tensor in architecture.block}
    rule = architecture.router
    if architecture is not MIXTRAL and architecture is not GRANITE_MOE:
        # absent in config.json: as in transformers, whose default is False for all but GLM
        default = rule.scoring is Scoring.SIGMOID
        rule = replace(rule, renormalise=keys.boolean("norm_topk_prob", default))
    if Role.SELECTION_BIAS in has:
        groups, used = keys.integer("n_group"), keys.integer("topk_group")
        rule = replace(rule, scale=keys.real("routed_scaling_factor", 1.0), groups=groups, groups_used=used)
    fields["router"] = rule
    if architecture.window is Window.EVERY_LAYER:
        fields["sliding_window"] = keys.optional_integer("sliding_window")
    if architecture.dense_layers is DenseLayers.LEADING:
        fields["feed_forward_length"] = keys.integer("intermediate_size")
        fields["leading_dense_block_count"] = keys.integer("first_k_dense_replace")
    fields["expert_shared_feed_forward_length"] = _shared_width(keys)
    absent = set()
    if architecture is GLM4_MOE:
        absent |= set() if keys.boolean("use_qk_norm", False) else {Role.QUERY_NORM, Role.KEY_NORM}
        absent |= set() if keys.boolean("attention_bias", False) else {Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS}
    if Role.SHARED_GATE in has and not fields["expert_shared_feed_forward_length"]:
        absent |= {Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}
    fields["absent"] = frozenset(absent)
    if architecture is OLMOE and (clip := keys.optional_real("clip_qkv")) is not None:
        fields["clamp_kqv"] = clip
    if architecture.scaled:
        for name, key in _MULTIPLIERS.items():
            fields[name] = keys.real(key, 1.0)
    return fields


def _shared_width(keys: _Keys) -> int:
    """The shared experts' joint width; 0 where there are none."""
    if keys.family.architecture is QWEN2_MOE:
        return keys.integer("shared_expert_intermediate_size")
    if keys.family.architecture is GRANITE_MOE:
        return keys.integer("shared_intermediate_size")
    if keys.family.architecture.shared_experts is SharedExperts.NONE:
        return 0
    return keys.integer("n_shared_experts") * keys.integer(keys.family.expert_width)


class _Keys:
    """Typed look-ups in config.json.

    An absent key has transformers' default, the family's. An explicit `null` is refused, as in transformers 5, except
    where it has a meaning: no `head_dim` (it follows from the width), no `sliding_window`, no RoPE key (the default)
    and, in transformers 4, as many `num_key_value_heads` as heads.
    """

    def __init__(self, path: Path, values: Mapping[str, object], family: Family) -> None:
        self._path, self._values = path, values
        self.family = family

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {message}")

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError for quantised weights, and for arithmetic that the GGUF could not express."""
        quantisation = self._values.get("quantization_config")
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if quantisation is None and self._path.with_name(name).is_file():
                quantisation = name
        if quantisation is not None:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
            raise self.error(
                f"the weights are quantised (quantization_config: {quoted(method, 40)}); "
                "convert the original bf16, f16 or f32 checkpoint"
            )
        name = self.family.architecture.name
        activation = self._values.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act is {quoted(activation, 40)}; a {name}'s experts use 'silu'")
        for key, allowed in self.family.refused.items():
            value = self._values.get(key)
            if value is None or value in allowed:
                continue
            if key.endswith("_bias"):
                biases = "has no biases" if False in allowed else "has biases"
                raise self.error(f"{key} is {quoted(value, 40)}; a {name} {biases}")
            raise self.error(f"{key} is {quoted(value, 40)}; only {quoted(allowed[0])} converts")

    def rope_theta(self) -> float:
        """The base of RoPE, at top level (transformers 4) or in `rope_parameters` (5); scaled RoPE is refused."""
        thetas = [self.optional_real("rope_theta")]
        for group in ("rope_parameters", "rope_scaling"):
            rope = self._values.get(group)
            if rope is None:
                continue
            if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
                raise self.error(f"{group} is {quoted(rope, 60)}; one unscaled RoPE for all layers converts")
            kinds = ("default", *(_IDENTITY if rope.get("factor") == 1 else ()))
            for key, allowed in (
                *(("rope_type", kinds), ("type", kinds), ("factor", (1,)), ("attention_factor", (1,))),
                *(("mscale", (1,)), ("mscale_all_dim", (1,))),
            ):
                value = rope.get(key)
                if value is not None and value not in allowed:
                    raise self.error(f"{group}.{key} is {quoted(value, 40)}; only unscaled RoPE converts")
            thetas.append(_Keys(self._path, rope, self.family).optional_real("rope_theta"))
        bases = {base for base in thetas if base is not None}
        if len(bases) > 1:
            raise self.error(f"rope_theta has the values {sorted(bases)}; keep the right one")
        return bases.pop() if bases else self.family.theta

    def partial_rotary(self) -> float:
        """The part of a head that is rotated, at top level (transformers 4) or in `rope_parameters` (5)."""
        key, whole = "partial_rotary_factor", self.family.partial_rotary == 1.0
        for group in ("rope_parameters", "rope_scaling", None):
            values = self._values if group is None else self._values.get(group)
            if not isinstance(values, dict) or values.get(key) is None:
                continue
            name = key if group is None else f"{group}.{key}"
            if whole and values[key] != 1:
                architecture = self.family.architecture.name
                raise self.error(f"{name} is {quoted(values[key], 40)}; a {architecture} rotates whole heads")
            factor = _Keys(self._path, values, self.family).optional_real(key)
            if factor is None or not 0 < factor <= 1:
                raise self.error(f"{name} is {quoted(factor, 40)}; it must lie between 0 and 1")
            return factor
        return self.family.partial_rotary

    def first_present(self, names: Sequence[str]) -> str:
        """The first of several names of one key that is there; without any, the first."""
        return next((name for name in names if name in self._values), names[0])

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            state = "null" if key in self._values else "missing"
            raise self.error(f"{key} is {state}; it must be an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self._values.get(key, self.family.defaults.get(key))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(f"{key} is {quoted(value, 40)}; it must be an integer")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.optional_real(key) if key in self._values else default
        if value is None:
            raise self.error(f"{key} is null; it must be a number")
        return value

    def optional_real(self, key: str) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _in_float32(value):
            raise self.error(f"{key} is {quoted(value, 40)}; it must be a number that float32 can hold")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {quoted(value, 40)}; it must be true or false")
        return value


def _in_float32(value: float) -> bool:
    """Whether float32, in which the GGUF stores it, holds a number: neither as an infinity nor, but for 0, as 0."""
    return value == 0 or _SMALLEST_REAL <= abs(value) <= _LARGEST_REAL

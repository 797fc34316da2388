"""Reads a Hugging Face folder's config.json as `Config`. Knows transformers' keys and defaults; opens no weights.

The keys are those of transformers' configuration classes, versions 4 and 5. A key that would change the model's
arithmetic and has no equivalent in the GGUF is refused by name, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fiddler.converters.families import FAMILIES
from fiddler.converters.family import Family
from fiddler.converters.hf_keys import HfKeys
from fiddler.converters.json_object import read_object
from fiddler.converters.rope_parameters import partial_rotary, rope_scaling, rope_theta
from fiddler.errors import CheckpointError, FileFormatError, quoted
from fiddler.models import MIXTRAL
from fiddler.models.architecture import (
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
from fiddler.models.deepseek import DEEPSEEK2
from fiddler.models.gpt_oss import GPT_OSS
from fiddler.models.granite import GRANITE_MOE

__all__ = ["HfConfig", "read_hf_config"]

_MOST_FURTHER_LAYERS = 64
_MULTIPLIERS = {  # attributes of `Config`, and Granite's keys
    "attention_scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


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
    keys = HfKeys(path, values, _family(path, values))
    keys.refuse_unsupported()
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    latent, layers = _latent(keys), keys.integer("num_hidden_layers")
    head_dim, kv_heads = keys.optional_integer("head_dim"), keys.optional_integer("num_key_value_heads")
    if latent is not None:
        rotated, kv_heads = keys.integer("qk_rope_head_dim"), 1
        head_dim = latent.latent + rotated
    elif head_dim is None and (heads < 1 or width % heads):
        names = keys.name("hidden_size"), keys.name("num_attention_heads")
        raise keys.error(f"{names[0]} {width} over {names[1]} {heads} is not an integer; set head_dim")
    else:
        head_dim = width // heads if head_dim is None else head_dim
        rotated = int(partial_rotary(keys) * head_dim)
    context, experts = keys.integer("max_position_embeddings"), keys.family.architecture.has_experts
    try:
        config = Config(
            keys.family.architecture,
            vocab_size=keys.integer("vocab_size"),
            context_length=context,
            embedding_length=width,
            block_count=layers,
            expert_feed_forward_length=keys.integer(keys.family.expert_width) if experts else 0,
            head_count=heads,
            head_count_kv=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            expert_count=keys.integer(keys.first_present(keys.family.experts)) if experts else 0,
            expert_used_count=keys.integer("num_experts_per_tok") if experts else 0,
            rms_epsilon=keys.real("rms_norm_eps", keys.family.epsilon),
            rope_freq_base=rope_theta(keys),
            rope_dimension_count=None if rotated == head_dim else rotated,
            latent=latent,
            **_parts(keys),
        )
        config = replace(config, rope_scaling=rope_scaling(keys, config.rotated, context))  # once widths are checked
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


def _parts(keys: HfKeys) -> dict[str, Any]:
    """The fields of `Config` that only some architectures have."""
    architecture, fields = keys.family.architecture, dict[str, Any]()
    has = {tensor.role for tensor in architecture.block}
    fields["router"] = _router(keys)
    if architecture.window is Window.EVERY_LAYER and keys.family.windowed:
        fields["sliding_window"] = keys.optional_integer("sliding_window")
    elif architecture.window is Window.EVERY_SECOND:
        fields["sliding_window"] = _alternating_window(keys)
    if architecture.dense_layers is DenseLayers.LEADING:
        fields["feed_forward_length"] = keys.integer("intermediate_size")
        fields["leading_dense_block_count"] = keys.integer("first_k_dense_replace")
    elif architecture.dense_layers is DenseLayers.EVERY:
        fields["feed_forward_length"] = keys.integer("intermediate_size")
        fields["leading_dense_block_count"] = keys.integer("num_hidden_layers")
    fields["expert_shared_feed_forward_length"] = _shared_width(keys)
    absent = set[Role]()
    if architecture is DEEPSEEK2:
        query = {Role.QUERY_DOWN, Role.QUERY_DOWN_NORM, Role.QUERY_UP}
        absent |= {Role.KEY_VALUE_UP, *(query if keys.optional_integer("q_lora_rank") is None else {Role.QUERY})}
        absent |= set() if keys.family.scoring is Scoring.SIGMOID else {Role.SELECTION_BIAS}
    for key, roles in keys.family.switches.items():
        absent |= set() if keys.boolean(key, False) else set(roles)
    if Role.SHARED_GATE in has and not fields["expert_shared_feed_forward_length"]:
        absent |= {Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}
    fields["absent"] = frozenset(absent)
    if keys.family.clamp is not None:
        fields["clamp_kqv"] = keys.optional_real(keys.family.clamp)
    if architecture.scaled:
        for name, key in _MULTIPLIERS.items():
            fields[name] = keys.real(key, 1.0)
    return fields


def _alternating_window(keys: HfKeys) -> int:
    """The window of every second layer, the first one first."""
    kinds, names = keys.values.get("layer_types"), ("sliding_attention", "full_attention")
    layers = len(kinds) if isinstance(kinds, list) else 0  # no list as long as a hostile num_hidden_layers
    in_turns = layers == keys.integer("num_hidden_layers") and kinds == [names[i % 2] for i in range(layers)]
    if kinds is not None and not in_turns:
        raise keys.error(
            f"layer_types is {quoted(kinds, 60)}; only 'sliding_attention' and 'full_attention' in turns run"
        )
    return keys.integer("sliding_window")


def _router(keys: HfKeys) -> RouterRule:
    """The router's rule, as transformers computes it: its DeepSeek-V2 ignores `norm_topk_prob`."""
    family, rule = keys.family, keys.family.architecture.router
    if family.architecture in (MIXTRAL, GRANITE_MOE, GPT_OSS) or not family.architecture.has_experts:
        return rule
    if family.architecture is DBRX:  # a norm's order, 1, or null
        order = keys.name("norm_topk_prob")
        return replace(rule, renormalise=keys.values.get(order, 1.0) is not None)
    scoring = family.scoring or rule.scoring
    # absent in config.json: as in transformers, whose default is False for all but those with sigmoids
    renormalise = keys.boolean("norm_topk_prob", scoring is Scoring.SIGMOID)
    rule = replace(rule, scoring=scoring, renormalise=renormalise)
    if family.architecture is DEEPSEEK2 and scoring is Scoring.SOFTMAX:
        rule = replace(rule, renormalise=False, scale=keys.real("routed_scaling_factor", 1.0))
        if keys.values.get("topk_method", "greedy") == "greedy":
            return rule
        return replace(rule, groups=keys.integer("n_group"), groups_used=keys.integer("topk_group"))
    if scoring is Scoring.SIGMOID:
        groups, used = keys.integer("n_group"), keys.integer("topk_group")
        scale = keys.real("routed_scaling_factor", family.scale)
        rule = replace(rule, scale=scale, groups=groups, groups_used=used)
    return rule


def _latent(keys: HfKeys) -> LatentWidths | None:
    """The widths of latent attention, where the family has it."""
    if keys.family.architecture.attention is AttentionKind.HEADS:
        return None
    rank = keys.optional_integer("q_lora_rank")
    if rank is not None and rank < 1:
        raise keys.error(f"q_lora_rank is {rank}; it must be positive, or null")
    return LatentWidths(
        latent=keys.integer("kv_lora_rank"),
        key=keys.integer("qk_nope_head_dim") + keys.integer("qk_rope_head_dim"),
        value=keys.integer("v_head_dim"),
        query=rank or 0,
    )


def _shared_width(keys: HfKeys) -> int:
    """The shared experts' joint width; 0 where there are none."""
    if keys.family.shared_width is not None:
        return keys.integer(keys.family.shared_width)
    if keys.family.architecture.shared_experts is SharedExperts.NONE:
        return 0
    return keys.integer("n_shared_experts") * keys.integer(keys.family.expert_width)

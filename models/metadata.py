"""A model's hyper-parameters in GGUF metadata: reads and writes `Config`, under llama.cpp's keys. No files."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fiddler.errors import FileFormatError, quoted
from fiddler.models import ARCHITECTURES, MIXTRAL
from fiddler.models.architecture import Architecture, DenseLayers, Role, RouterRule, Scoring, SharedExperts, Window
from fiddler.models.config import Config

__all__ = ["read_config", "to_metadata"]

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
    mixture of experts or not a known one, and where attention or RoPE are of a kind that does not run.
    """
    gguf_name = metadata.get("general.architecture")
    if not isinstance(gguf_name, str) or gguf_name not in ARCHITECTURES:
        known = ", ".join(f"{each.name} ({each.gguf_name!r})" for each in ARCHITECTURES.values())
        raise FileFormatError(f"general.architecture is {quoted(gguf_name)}; only {known} runs")
    architecture = ARCHITECTURES[gguf_name]
    keys = _Keys(metadata, gguf_name)
    expert_count = keys.integer("expert_count", 0)
    if expert_count == 0:
        raise FileFormatError(f"{gguf_name}.expert_count is missing or 0: a dense model, not a mixture of experts")
    _reject_unsupported(metadata, architecture)
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if heads < 1 or width < 1:
        raise FileFormatError(f"embedding_length is {width} and attention.head_count {heads}; both must be positive")
    head_dim = keys.integer("attention.key_length", width // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise FileFormatError(
            f"{gguf_name}.attention.value_length is {keys.integer('attention.value_length')}, but a head is {head_dim} "
            f"wide: not a {architecture.name}"
        )
    feed_forward = keys.integer("feed_forward_length")
    expert_width = keys.integer("expert_feed_forward_length", feed_forward)
    rotated = keys.integer("rope.dimension_count", head_dim)
    scales = {name: keys.real(key, 0.0) for key, name in _SCALES.items() if architecture.scaled}
    return Config(
        architecture,
        vocab_size=keys.integer("vocab_size", _token_count(metadata)),
        context_length=keys.integer("context_length"),
        embedding_length=width,
        block_count=_block_count(keys),
        expert_feed_forward_length=expert_width,
        head_count=heads,
        head_count_kv=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        expert_count=expert_count,
        expert_used_count=keys.integer("expert_used_count"),
        rms_epsilon=keys.real("attention.layer_norm_rms_epsilon"),
        rope_freq_base=keys.real("rope.freq_base", 10000.0),
        sliding_window=_window(keys, architecture),
        router=_router(keys, architecture),
        rope_dimension_count=None if rotated == head_dim else rotated,
        feed_forward_length=0 if architecture.dense_layers is DenseLayers.NONE else feed_forward,
        leading_dense_block_count=keys.integer("leading_dense_block_count", 0),
        expert_shared_feed_forward_length=_shared_width(keys, architecture, expert_width),
        absent=_absent(architecture, tensors),
        clamp_kqv=keys.real("attention.clamp_kqv", 0.0) or None,
        **{name: value for name, value in scales.items() if value},  # 0: none, as in llama.cpp
    )


def to_metadata(config: Config) -> dict[str, int | float | bool]:
    """The keys that `read_config` reads; store `int` values as uint32, `float` values as float32."""
    prefix, default = config.architecture.gguf_name, config.architecture.router
    values: dict[str, int | float | bool] = {
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
        "expert_count": config.expert_count,
        "expert_used_count": config.expert_used_count,
        "attention.layer_norm_rms_epsilon": float(config.rms_epsilon),
        "rope.freq_base": float(config.rope_freq_base),
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
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
    if config.clamp_kqv is not None:
        values["attention.clamp_kqv"] = float(config.clamp_kqv)
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _router(keys: _Keys, architecture: Architecture) -> RouterRule:
    default = architecture.router
    number = keys.integer("expert_gating_func", 0)
    if number and number not in _SCORINGS:
        raise FileFormatError(f"{keys.prefix}.expert_gating_func is {number}; only 1 (softmax) and 2 (sigmoid) run")
    return RouterRule(
        scoring=_SCORINGS.get(number, default.scoring),
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


def _shared_width(keys: _Keys, architecture: Architecture, expert_width: int) -> int:
    """The shared experts' joint width: a key of its own, or their number."""
    if architecture.shared_experts is SharedExperts.NONE:
        return 0
    return keys.integer("expert_shared_feed_forward_length", keys.integer("expert_shared_count", 0) * expert_width)


def _window(keys: _Keys, architecture: Architecture) -> int | None:
    """Positions; None where there is no window. llama.cpp ignores the key for Mixtral, transformers does not."""
    return None if architecture.window is Window.NONE else keys.integer("attention.sliding_window", 0) or None


def _block_count(keys: _Keys) -> int:
    """Layers without those that predict further tokens (`nextn_predict_layers`), which stand last in the file."""
    return keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)


def _absent(architecture: Architecture, tensors: Collection[str]) -> frozenset[Role]:
    """The roles of optional tensors of which the file has none at all."""
    present = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.") and name.count(".") >= 2}
    return frozenset(each.role for each in architecture.block if each.optional and each.name not in present)


class _Keys:
    """Typed look-ups of an architecture's keys in GGUF metadata."""

    def __init__(self, metadata: Mapping[str, object], prefix: str) -> None:
        self._metadata, self.prefix = metadata, prefix

    def _value(self, key: str, default: object) -> object:
        value = self._metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise FileFormatError(f"{self.prefix}.{key} is missing from the metadata; convert the model again")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be one integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be one number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be true or false")
        return value


def _reject_unsupported(metadata: Mapping[str, object], architecture: Architecture) -> None:
    """Reject options of llama.cpp (`llama_model::load_hparams`) that no architecture here has."""
    prefix = architecture.gguf_name
    supported: dict[str, tuple[object, ...]] = {"attention.causal": (True,)}
    if not architecture.scaled:
        supported["attention.scale"] = (0.0,)
    scaling = metadata.get(f"{prefix}.rope.scaling.type")
    if not isinstance(scaling, str) or scaling != "none":  # no type and a factor: linear
        identity = ("linear", "yarn")  # none, where the factor is 1
        supported |= {"rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (0.0, 1.0), "rope.scaling.type": identity}
        supported |= {"rope.scaling.attn_factor": (0.0, 1.0)}
    for key, allowed in supported.items():
        value = metadata.get(f"{prefix}.{key}")
        if value is not None and not (isinstance(value, (int, float, str)) and value in allowed):
            raise FileFormatError(f"{prefix}.{key} is {quoted(value)}; only plain attention and unscaled RoPE run")


def _token_count(metadata: Mapping[str, object]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None

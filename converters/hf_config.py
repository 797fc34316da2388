"""Reads a Hugging Face Mixtral's config.json as `Config`. Knows transformers' keys and defaults; opens no weights.

The keys are those of transformers' `MixtralConfig`, versions 4 and 5. A key that would change the model's
arithmetic and has no equivalent in the GGUF is refused by name, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fiddler.converters.json_object import read_object
from fiddler.errors import CheckpointError, FileFormatError, quoted
from fiddler.models.config import Config
from fiddler.models.mixtral import MIXTRAL

__all__ = ["HfConfig", "read_hf_config"]

# Values of absent keys: the defaults of transformers' `MixtralConfig`, version 5.
_INTEGERS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_EPSILON = 1e-5
_THETA = 1e6  # if no RoPE key has a base
_LARGEST_REAL, _SMALLEST_REAL = 3.4e38, 1.4e-45
_IDENTITY = ("linear", "yarn", "llama3")  # scalings that a factor of 1 makes none


@dataclass(frozen=True)
class HfConfig:
    """The hyper-parameters in config.json; `tied`: it says that `token_embd` is the output matrix, too."""

    config: Config
    tied: bool


def read_hf_config(folder: Path) -> HfConfig:
    """Read `folder`/config.json. Raises CheckpointError for anything but an unquantised Mixtral."""
    path = folder / "config.json"
    keys = _Keys(path, read_object(path, "give the folder of a Hugging Face checkpoint"))
    keys.refuse_unsupported()
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim, kv_heads = keys.optional_integer("head_dim"), keys.optional_integer("num_key_value_heads")
    if head_dim is None and (heads < 1 or width % heads):
        raise keys.error(f"hidden_size {width} over num_attention_heads {heads} is not an integer; set head_dim")
    try:
        config = Config(
            MIXTRAL,
            vocab_size=keys.integer("vocab_size"),
            context_length=keys.integer("max_position_embeddings"),
            embedding_length=width,
            block_count=keys.integer("num_hidden_layers"),
            feed_forward_length=keys.integer("intermediate_size"),
            head_count=heads,
            head_count_kv=heads if kv_heads is None else kv_heads,
            head_dim=width // heads if head_dim is None else head_dim,
            expert_count=keys.integer("num_local_experts"),
            expert_used_count=keys.integer("num_experts_per_tok"),
            rms_epsilon=keys.real("rms_norm_eps", _EPSILON),
            rope_freq_base=keys.rope_theta(),
            sliding_window=keys.optional_integer("sliding_window"),
        )
    except FileFormatError as error:
        raise keys.error(str(error)) from None
    return HfConfig(config, keys.boolean("tie_word_embeddings", False))


class _Keys:
    """Typed look-ups in config.json.

    An absent key has transformers' default. An explicit `null` is refused, as in transformers 5, except where it
    has a meaning: no `head_dim` (it follows from the width), no `sliding_window`, no RoPE key (the default) and, in
    transformers 4, as many `num_key_value_heads` as heads.
    """

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self._path = path
        self._values = values

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {message}")

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError for another model, or a Mixtral whose arithmetic the GGUF could not express."""
        kind = self._values.get("model_type")
        if kind != "mixtral":
            named = "" if kind else f" (architectures: {quoted(self._values.get('architectures'), 60)})"
            raise self.error(f"model_type is {quoted(kind, 40)}{named}; only 'mixtral' converts")
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
        activation = self._values.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act is {quoted(activation, 40)}; a Mixtral's experts use 'silu'")
        for key in ("attention_bias", "mlp_bias"):
            if self._values.get(key):
                raise self.error(f"{key} is {quoted(self._values[key], 40)}; a Mixtral has no biases")

    def rope_theta(self) -> float:
        """The base of RoPE, at top level (transformers 4) or in `rope_parameters` (5); scaled RoPE is refused."""
        thetas = [self.optional_real("rope_theta")]
        self._refuse_partial("partial_rotary_factor", self._values)
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
            self._refuse_partial(f"{group}.partial_rotary_factor", rope)
            thetas.append(_Keys(self._path, rope).optional_real("rope_theta"))
        bases = {base for base in thetas if base is not None}
        if len(bases) > 1:
            raise self.error(f"rope_theta has the values {sorted(bases)}; keep the right one")
        return bases.pop() if bases else _THETA

    def _refuse_partial(self, name: str, values: Mapping[str, object]) -> None:
        factor = values.get("partial_rotary_factor")
        if factor is not None and factor != 1:
            raise self.error(f"{name} is {quoted(factor, 40)}; a Mixtral rotates whole heads")

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            raise self.error(f"{key} is null; it must be an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self._values.get(key, _INTEGERS.get(key))
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

"""Hyper-parameters of a model, read from GGUF metadata, and the tensor shapes they imply. No torch, no files.

Letters used in all rooms: `T` tokens, `D` model width (`embedding_length`), `F` expert width
(`feed_forward_length`), `E` experts, `K` experts a token, `H` heads, `G` KV heads, `L` layers, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fiddler.errors import FileFormatError, quoted
from fiddler.models import ARCHITECTURES
from fiddler.models.architecture import Architecture, ModelTensor

__all__ = ["Config"]

_MAX_DIMENSION = 1 << 24  # keeps the product of any three dimensions far from 2**63


@dataclass(frozen=True)
class Config:
    """One model's architecture and hyper-parameters; attribute names are GGUF's, less the architecture's prefix."""

    architecture: Architecture
    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int  # `attention.key_length`
    expert_count: int
    expert_used_count: int
    rms_epsilon: float
    rope_freq_base: float
    sliding_window: int | None = None  # positions that a query attends to, its own included

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "context_length",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "head_count",
            "head_count_kv",
            "head_dim",
            "expert_count",
            "expert_used_count",
        ):
            value = getattr(self, field)
            if not 1 <= value <= _MAX_DIMENSION:
                raise FileFormatError(f"{field} is {value}; it must lie between 1 and {_MAX_DIMENSION}")
        if self.expert_used_count > self.expert_count:
            raise FileFormatError(
                f"expert_used_count is {self.expert_used_count}, but there are only {self.expert_count} experts"
            )
        if self.head_count % self.head_count_kv:
            raise FileFormatError(
                f"head_count is {self.head_count}, not a multiple of head_count_kv {self.head_count_kv}"
            )
        if self.head_dim % 2:
            raise FileFormatError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if not (math.isfinite(self.rms_epsilon) and 0.0 <= self.rms_epsilon < 1.0):
            raise FileFormatError(f"layer_norm_rms_epsilon is {self.rms_epsilon}; it must lie in [0, 1)")
        if not (math.isfinite(self.rope_freq_base) and self.rope_freq_base > 0.0):
            raise FileFormatError(f"rope.freq_base is {self.rope_freq_base}; it must be positive")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 1 << 31:
            raise FileFormatError(f"sliding_window is {self.sliding_window}; it must lie between 1 and 2**31 - 1")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Config:
        """Read the hyper-parameters from a GGUF's metadata.

        Raises FileFormatError where a key is missing, of another type or out of range, where the architecture is
        not a mixture of experts, and where attention is not plain or RoPE is scaled.
        """
        gguf_name = metadata.get("general.architecture")
        if not isinstance(gguf_name, str) or gguf_name not in ARCHITECTURES:
            known = " or ".join(f"{each.name} ({each.gguf_name!r})" for each in ARCHITECTURES.values())
            raise FileFormatError(f"general.architecture is {quoted(gguf_name)}; only {known} runs")
        architecture = ARCHITECTURES[gguf_name]
        keys = _Keys(metadata, gguf_name)
        expert_count = keys.integer("expert_count", 0)
        if expert_count == 0:
            raise FileFormatError(f"{gguf_name}.expert_count is missing or 0: a dense model, not a mixture of experts")
        _reject_unsupported(metadata, gguf_name)
        width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
        if heads < 1 or width < 1:
            raise FileFormatError(
                f"embedding_length is {width} and attention.head_count {heads}; both must be positive"
            )
        head_dim = keys.integer("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if keys.integer(key, head_dim) != head_dim:
                raise FileFormatError(
                    f"{gguf_name}.{key} is {keys.integer(key)}, but a head is {head_dim} wide: "
                    f"not a {architecture.name}"
                )
        feed_forward = keys.integer("feed_forward_length")
        window = keys.integer("attention.sliding_window", 0)
        return cls(
            architecture,
            vocab_size=keys.integer("vocab_size", _token_count(metadata)),
            context_length=keys.integer("context_length"),
            embedding_length=width,
            block_count=keys.integer("block_count"),
            feed_forward_length=keys.integer("expert_feed_forward_length", feed_forward),
            head_count=heads,
            head_count_kv=keys.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            expert_count=expert_count,
            expert_used_count=keys.integer("expert_used_count"),
            rms_epsilon=keys.real("attention.layer_norm_rms_epsilon"),
            rope_freq_base=keys.real("rope.freq_base", 10000.0),
            sliding_window=window or None,
        )

    def to_metadata(self) -> dict[str, int | float]:
        """The keys that `from_metadata` reads; store `int` values as uint32, `float` values as float32."""
        values: dict[str, int | float] = {
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "embedding_length": self.embedding_length,
            "block_count": self.block_count,
            "feed_forward_length": self.feed_forward_length,
            "attention.head_count": self.head_count,
            "attention.head_count_kv": self.head_count_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "rope.dimension_count": self.head_dim,
            "expert_count": self.expert_count,
            "expert_used_count": self.expert_used_count,
            "attention.layer_norm_rms_epsilon": float(self.rms_epsilon),
            "rope.freq_base": float(self.rope_freq_base),
        }
        if self.sliding_window is not None:
            values["attention.sliding_window"] = self.sliding_window
        return {f"{self.architecture.gguf_name}.{key}": value for key, value in values.items()}

    def shape(self, tensor: ModelTensor) -> tuple[int, ...]:
        """The shape of a tensor of this model, slowest dimension first as in numpy."""
        sizes = {
            "V": self.vocab_size,
            "D": self.embedding_length,
            "F": self.feed_forward_length,
            "E": self.expert_count,
            "H": self.head_count,
            "G": self.head_count_kv,
            "head_dim": self.head_dim,
        }
        return tuple(math.prod(sizes[letter] for letter in dimension.split(" * ")) for dimension in tensor.shape)

    def tensors(self, *, tied: bool) -> dict[str, ModelTensor]:
        """Every tensor of the model by its name, in file order; `tied`: `token_embd` is the output weight, too."""
        return self.architecture.tensors(self.block_count, tied=tied)


class _Keys:
    """Typed look-ups of an architecture's keys in GGUF metadata."""

    def __init__(self, metadata: Mapping[str, object], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix

    def _value(self, key: str, default: object) -> object:
        value = self._metadata.get(f"{self._prefix}.{key}", default)
        if value is None:
            raise FileFormatError(f"{self._prefix}.{key} is missing from the metadata; convert the model again")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FileFormatError(f"{self._prefix}.{key} is {quoted(value)}; it must be one integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileFormatError(f"{self._prefix}.{key} is {quoted(value)}; it must be one number")
        return float(value)


def _reject_unsupported(metadata: Mapping[str, object], prefix: str) -> None:
    """Reject options of llama.cpp's `llama` (`llama_model::load_hparams`) that no architecture here has."""
    supported: dict[str, tuple[object, ...]] = {"attention.causal": (True,), "attention.scale": (0.0,)}
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

"""Typed look-ups in config.json, with transformers' defaults of a family. Knows no hyper-parameter's meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fiddler.converters.family import Family
from fiddler.errors import CheckpointError, quoted

__all__ = ["HfKeys"]

_LARGEST_REAL, _SMALLEST_REAL = 3.4e38, 1.4e-45
_INTEGERS = 1 << 32  # none is as large: GGUF holds them in 32 bits


class HfKeys:
    """Typed look-ups in config.json.

    An absent key has transformers' default, the family's. An explicit `null` is refused, as in transformers 5, except
    where it has a meaning: no `head_dim` (it follows from the width), no `sliding_window`, no RoPE key (the default)
    and, in transformers 4, as many `num_key_value_heads` as heads.
    """

    def __init__(self, path: Path, values: Mapping[str, object], family: Family) -> None:
        self.path, self.values, self.family = path, values, family
        self.values = {**values, **dict(self._members())}

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def name(self, key: str) -> str:
        """The family's own name of a key."""
        return self.family.keys.get(key, key)

    def _members(self) -> Iterator[tuple[str, object]]:
        """The members of objects that the family's keys name, as `object.member`."""
        for name in (*self.family.keys.values(), *self.family.theta_keys):
            *objects, last = name.split(".")
            holder: object = self.values
            for each in objects:
                holder = holder.get(each) if isinstance(holder, Mapping) else None
                if not (holder is None or isinstance(holder, Mapping)):
                    raise self.error(f"{each} is {quoted(holder, 40)}; it must be an object")
            if isinstance(holder, Mapping) and last in holder:
                yield name, holder[last]

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError for quantised weights, and for arithmetic that the GGUF could not express."""
        quantisation = self.values.get("quantization_config")
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if quantisation is None and self.path.with_name(name).is_file():
                quantisation = name
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        if quantisation is not None and (method is None or method != self.family.quantised):
            raise self.error(
                f"the weights are quantised (quantization_config: {quoted(method, 40)}); "
                "convert the original bf16, f16 or f32 checkpoint"
            )
        name = self.family.architecture.name
        key = self.name("hidden_act")
        activation = self.values.get(key, "silu")
        if activation != "silu":
            raise self.error(f"{key} is {quoted(activation, 40)}; a {name} uses 'silu'")
        for key, allowed in self.family.refused.items():
            value = self.values.get(key)
            if value is None or value in allowed:
                continue
            if key.endswith("_bias"):
                biases = "has no biases" if False in allowed else "has biases"
                raise self.error(f"{key} is {quoted(value, 40)}; a {name} {biases}")
            raise self.error(f"{key} is {quoted(value, 40)}; only {quoted(allowed[0])} converts")

    def first_present(self, names: Sequence[str]) -> str:
        """The first of several names of one key that is there; without any, the first."""
        return next((name for name in names if self.name(name) in self.values), names[0])

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            state = "null" if self.name(key) in self.values else "missing"
            raise self.error(f"{self.name(key)} is {state}; it must be an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self.values.get(self.name(key), self.family.defaults.get(key))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(f"{self.name(key)} is {quoted(value, 40)}; it must be an integer")
        if value is not None and abs(value) >= _INTEGERS:
            raise self.error(f"{self.name(key)} is {quoted(value, 40)}; it must be below 2**32")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.optional_real(key) if self.name(key) in self.values else default
        if value is None:
            raise self.error(f"{self.name(key)} is null; it must be a number")
        return value

    def optional_real(self, key: str) -> float | None:
        value = self.values.get(self.name(key))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _in_float32(value):
            raise self.error(f"{self.name(key)} is {quoted(value, 40)}; it must be a number that float32 can hold")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(self.name(key), default)
        if not isinstance(value, bool):
            raise self.error(f"{self.name(key)} is {quoted(value, 40)}; it must be true or false")
        return value


def _in_float32(value: float) -> bool:
    """Whether float32, in which the GGUF stores it, holds a number: neither as an infinity nor, but for 0, as 0."""
    return value == 0 or _SMALLEST_REAL <= abs(value) <= _LARGEST_REAL

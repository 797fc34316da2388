"""Typed look-ups in GGUF metadata. Knows the types of values; not what they mean."""

from __future__ import annotations

from collections.abc import Mapping

from fiddler.errors import FileFormatError, quoted

__all__ = ["MetadataKeys"]


class MetadataKeys:
    """Typed look-ups of an architecture's keys in GGUF metadata."""

    def __init__(self, metadata: Mapping[str, object], prefix: str) -> None:
        self._metadata, self.prefix = metadata, prefix

    def value(self, key: str, default: object) -> object:
        """The value of a key, of any type; raises FileFormatError where it is missing and has no default."""
        value = self._metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise FileFormatError(f"{self.prefix}.{key} is missing from the metadata; convert the model again")
        return value

    def __contains__(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self._metadata

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be one integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be one number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise FileFormatError(f"{self.prefix}.{key} is {quoted(value)}; it must be true or false")
        return value

    def whole_key_boolean(self, key: str, default: bool) -> bool:
        """As `boolean`, of a key without the architecture's prefix."""
        return MetadataKeys(self._metadata, key.partition(".")[0]).boolean(key.partition(".")[2], default)

"""Reads one JSON object from an untrusted file: config.json, an index, a safetensors header.

Refuses hostile and damaged JSON; does not know what the keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import read_regular

__all__ = ["parse_object", "read_object"]

_LARGEST_FILE = 64 << 20  # bytes; a config is 1 KB, the index of 32 layers 100 KB


def parse_object(raw: bytes, where: str) -> dict[str, object]:
    """Decode `raw` as one JSON object without duplicate keys.

    `where` names the source in messages. Raises CheckpointError for anything else: other bytes than UTF-8, syntax
    errors, numbers or nesting beyond the decoder's limits, an array instead of an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of a model") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {quoted(str(error))}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds {quoted(value, 40)}; it must be a JSON object")
    return value


def read_object(path: Path, remedy: str) -> dict[str, object]:
    """Read the JSON object in the regular file `path`; if the file is missing, the error ends with `remedy`."""
    try:
        raw = read_regular(path, _LARGEST_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; download it again") from None
    return parse_object(raw, str(path))


def _without_duplicates(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    unique: dict[str, object] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"the key {name!r} appears twice")
        unique[name] = value
    return unique

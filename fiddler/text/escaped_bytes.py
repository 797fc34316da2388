"""Bytes that are not UTF-8 inside a `str`, as Python's "surrogateescape" encodes them: U+DC80 to U+DCFF."""

from __future__ import annotations

import re

__all__ = ["ESCAPED", "SURROGATE", "canonical", "raw_bytes"]

ESCAPED = re.compile(r"([\udc80-\udcff])")
SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # a surrogate that encodes no byte


def canonical(text: str | bytes) -> str:
    """`text` as valid characters; each byte that is not UTF-8 becomes one of U+DC80 to U+DCFF."""
    if isinstance(text, str):
        if not SURROGATE.search(text):
            return text
        text = _LONE.sub("\ufffd", text).encode("utf-8", "surrogateescape")
    return text.decode("utf-8", "surrogateescape")


def raw_bytes(text: str) -> bytes:
    """A token's text as bytes; a name that was not UTF-8 gives its original bytes."""
    if text.isascii():
        return text.encode()
    return canonical(text).encode("utf-8", "surrogateescape")

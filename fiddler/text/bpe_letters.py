"""The letters of byte-level BPE: the characters that stand for the 256 bytes in token names, as GPT-2 chose them."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["LETTERS", "decoded", "missing_letters"]

# Printable characters of Latin-1 stand for themselves, the other bytes for the characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = sorted(set(range(256)) - _PRINTABLE)

LETTERS = "".join(chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)) for byte in range(256))
"""Byte -> its letter."""

_BYTES = dict.fromkeys(_OTHERS, 0xFFFD) | {ord(letter): byte for byte, letter in enumerate(LETTERS)}


# Bytes of no text: in no UTF-8, or only in that of planes without characters. Some vocabularies lack them.
_RARE = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF4, 0x100)}


def missing_letters(names: Container[str]) -> list[int]:
    """The bytes of text whose letters are no tokens: such a vocabulary has texts without ids."""
    return [byte for byte, letter in enumerate(LETTERS) if letter not in names and byte not in _RARE]


def decoded(name: str) -> bytes | None:
    """The bytes that an ordinary token's name stands for; None where one of its characters is no letter."""
    try:
        return name.translate(_BYTES).encode("latin-1")  # what is no letter lies beyond Latin-1 now
    except UnicodeEncodeError:
        return None

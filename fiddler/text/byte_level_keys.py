"""The keys of a GGUF's metadata that only byte-level BPE (`tokenizer.ggml.model = gpt2`) has: `ByteLevelKeys`.

Knows which pre-tokenisers run and llama.cpp's defaults; not the tokens that the merges name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fiddler.errors import FileFormatError, quoted
from fiddler.text.pre_tokenizers import PRE_TOKENIZERS

__all__ = ["IGNORE_MERGES", "NORMALIZER", "PREFIX", "ByteLevelKeys", "flag"]

PREFIX = "tokenizer.ggml."

IGNORE_MERGES = "fiddler.tokenizer.ignore_merges"
"""A metadata key of our own: whether a word that is a token is that token, whatever the merges say. Without it the name
of the pre-tokeniser decides, as in llama.cpp.
"""

NORMALIZER = "fiddler.tokenizer.normalizer"
"""A metadata key of our own: "NFC" for a tokenizer that composes characters first, as Qwen's. llama.cpp never does, nor
do files without the key.
"""


@dataclass(frozen=True)
class ByteLevelKeys:
    """What byte-level BPE needs beside the tokens."""

    pre: str  # a name in PRE_TOKENIZERS
    merges: list[str]  # two tokens with a space between them, by rank
    ignore_merges: bool
    nfc: bool

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts BOS before a text where the file does not say."""
        return PRE_TOKENIZERS[self.pre].add_bos

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], most_merges: int) -> ByteLevelKeys:
        """Check and gather the keys. Raises FileFormatError for one missing or malformed, or another pre-tokeniser."""
        pre = metadata.get(f"{PREFIX}pre")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            raise FileFormatError(
                f"tokenizer.ggml.pre is {quoted(pre)}, a pre-tokenizer that does not run; "
                f"these do: {', '.join(sorted(PRE_TOKENIZERS))}"
            )
        merges = metadata.get(f"{PREFIX}merges")
        if not isinstance(merges, list):
            raise FileFormatError(f"tokenizer.ggml.merges is {quoted(merges)}; it must be a list of strings")
        if len(merges) > most_merges:
            raise FileFormatError(
                f"tokenizer.ggml.merges holds {len(merges)} merges; at most {most_merges} are accepted"
            )
        normalizer = metadata.get(NORMALIZER)
        if normalizer is not None and not (isinstance(normalizer, str) and normalizer == "NFC"):
            raise FileFormatError(f"{NORMALIZER} is {quoted(normalizer)}; it must be 'NFC'")
        ignore_merges = flag(metadata, IGNORE_MERGES, PRE_TOKENIZERS[pre].ignore_merges)
        return cls(pre, merges, ignore_merges, normalizer is not None)

    def to_metadata(self) -> dict[str, str | bool | list[str]]:
        """The keys; ours only where they say more than llama.cpp's."""
        keys: dict[str, str | bool | list[str]] = {f"{PREFIX}pre": self.pre, f"{PREFIX}merges": self.merges}
        if self.ignore_merges != PRE_TOKENIZERS[self.pre].ignore_merges:
            keys[IGNORE_MERGES] = self.ignore_merges
        return keys | ({NORMALIZER: "NFC"} if self.nfc else {})


def flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    """The flag under `key`. Raises FileFormatError where it is no flag."""
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise FileFormatError(f"{key} is {quoted(value)}; it must be true or false")
    return value

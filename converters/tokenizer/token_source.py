"""Decides which file gives a folder's tokens, `tokenizer.json` or `tokenizer.model`, as transformers decides it.

transformers 5 reads `tokenizer.json` alone where there is one; else `tokenizer.model`, with `legacy` of
tokenizer_config.json as the rule for a space after a special token (`TokenizersBackend.convert_to_native_format` and
`SpmConverter.build_tokenizer_from_spm_proto`; `add_prefix_space` is not read for Mixtral). Knows where the two files
may disagree; not their formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from fiddler.converters.tokenizer.pieces import Pieces, read_tokenizer_model
from fiddler.converters.tokenizer.settings import TokenizerSettings
from fiddler.converters.tokenizer.tokenizer_json import TokenizerJson
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import present
from fiddler.text.sentencepiece_model import TokenType

__all__ = ["read_pieces"]


def read_pieces(folder: Path, settings: TokenizerSettings, tokenizer_json: TokenizerJson) -> tuple[Pieces, list[str]]:
    """The tokens of `folder` with the ids that transformers gives, and lines for the user.

    Raises CheckpointError if both files are missing, if one is malformed, or if llama.cpp's `llama` tokenizer cannot
    give the same ids.
    """
    model = folder / "tokenizer.model"
    if tokenizer_json.byte_level:
        if settings.flag("add_prefix_space", False):
            raise CheckpointError(
                f"{folder}: tokenizer_config.json says add_prefix_space true, "
                "which byte-level BPE in a GGUF cannot follow"
            )
        return tokenizer_json.pieces(), []
    if not present(model):
        if not present(folder / "tokenizer.json"):
            raise _missing(folder)
        pieces = tokenizer_json.pieces()
        return pieces, list(_prefix_warnings(settings, pieces, "tokenizer.json"))
    from_model = _with_legacy(read_tokenizer_model(model), settings)
    if not tokenizer_json.complete:
        return from_model, list(_prefix_warnings(settings, from_model, "tokenizer.model"))
    try:
        from_json = tokenizer_json.pieces()
    except CheckpointError as error:
        reason = str(error).rpartition("; ")[0]
        if difference := _different_token(from_model, tokenizer_json.texts()):
            raise CheckpointError(
                f"{reason}; and tokenizer.model beside it disagrees on {difference}: "
                "keep the file that belongs to these weights"
            ) from None
        return from_model, [f"{reason}; tokenizer.model is used, and some texts may get other ids than in transformers"]
    warnings = []
    texts = {index: piece.text for index, piece in from_json.by_id.items()}
    difference = _different_token(from_model, texts) or _different_order(from_model, from_json)
    if difference:
        warnings.append(f"{folder}: tokenizer.model and tokenizer.json disagree on {difference}")
    if from_json.add_space_prefix != from_model.add_space_prefix:
        warnings.append(f"{folder}: tokenizer.model and tokenizer.json disagree on a space before a text")
    warnings = [f"{line}; tokenizer.json is followed, as in transformers" for line in warnings]
    names = from_model.names | from_json.names
    return replace(from_json, names=names), warnings + list(_prefix_warnings(settings, from_json, "tokenizer.json"))


def _missing(folder: Path) -> CheckpointError:
    message = f"{folder} holds neither tokenizer.model nor tokenizer.json"
    for name, cause in (
        ("tekken.json", "is Mistral's own format, which is not read; put the model's tokenizer.json beside it"),
        ("vocab.json", "is half of a byte-level tokenizer and not read; put the model's tokenizer.json beside it"),
        ("tokenizer.model.*", "is not read under this name; rename it to tokenizer.model"),
    ):
        found = sorted(path.name for path in folder.glob(name))
        if found:
            return CheckpointError(f"{message}; {found[-1]} {cause}")
    return CheckpointError(f"{message}; download one of them again")


def _with_legacy(pieces: Pieces, settings: TokenizerSettings) -> Pieces:
    if pieces.add_space_prefix and settings.legacy is False:
        return replace(pieces, prepend_scheme="first")
    return pieces


def _prefix_warnings(settings: TokenizerSettings, pieces: Pieces, file: str) -> Iterator[str]:
    """Where tokenizer_config.json contradicts the rule for spaces that `pieces` holds."""
    wanted = settings.flag("add_prefix_space", pieces.add_space_prefix)
    if wanted != pieces.add_space_prefix:
        yield (
            f"tokenizer_config.json says add_prefix_space {str(wanted).lower()}, which transformers does not read for "
            f"a SentencePiece vocabulary; {file} is followed"
        )
    after_special = pieces.add_space_prefix and pieces.prepend_scheme != "first"
    if pieces.add_space_prefix and settings.legacy is not None and settings.legacy != after_special:
        yield (
            f"tokenizer_config.json says legacy {str(settings.legacy).lower()}, but {file} puts "
            f"{'a' if after_special else 'no'} space after a special token; {file} is followed, as in transformers"
        )


def _different_token(model: Pieces, texts: dict[int, str]) -> str | None:
    """The first token that differs; tokens that only tokenizer.json has may be added ones."""
    for index, piece in sorted(model.by_id.items()):
        text = texts.get(index, "")
        if text.replace("▁", " ") != piece.text.replace("▁", " "):
            return f"token {index} ({quoted(piece.text, 40)} and {quoted(text, 40)})"
    return None


def _different_order(model: Pieces, json: Pieces) -> str | None:
    """The first token that is merged earlier in one of the two than in the other."""
    normal = [index for index, piece in json.by_id.items() if piece.type == TokenType.NORMAL and len(piece.text) > 1]
    lowest = min((json.by_id[index].score for index in normal), default=0.0)  # of tokens that no merge makes
    merged = sorted((i for i in normal if json.by_id[i].score > lowest), key=lambda i: -json.by_id[i].score)
    for earlier, later in pairwise(merged):
        if model.by_id[later].score > model.by_id[earlier].score:
            return f"the merges of {quoted(json.by_id[earlier].text, 40)} and {quoted(json.by_id[later].text, 40)}"
    return None

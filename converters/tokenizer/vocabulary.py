"""The tokenizer of a Hugging Face folder as GGUF's keys hold it: `Vocabulary`.

Several files contribute: `tokenizer.json` or `tokenizer.model` the tokens (`token_source`), these and three more the
added tokens, the configurations the special tokens. This file brings them together; it does not know the formats
(`pieces`, `tokenizer_json`) or the weights. The keys are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from fiddler.converters.tokenizer.added_token import AddedToken
from fiddler.converters.tokenizer.pieces import SPACE, Piece, Pieces
from fiddler.converters.tokenizer.settings import TokenizerSettings
from fiddler.converters.tokenizer.token_source import read_pieces
from fiddler.converters.tokenizer.tokenizer_json import TokenizerJson
from fiddler.errors import CheckpointError, quoted
from fiddler.text.byte_level_keys import ByteLevelKeys
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import ADDED_TOKEN_IDS, IN_TEXT_IDS, LARGEST_VOCABULARY, LONGEST_TOKEN, PREPEND_SCHEME

__all__ = ["Vocabulary", "read_vocabulary"]

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # never read; llama.cpp's converter writes the same

_IMPOSSIBLE = re.compile(r"[\0\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# An added token of the same name does not change these types.
_FIXED = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE}
# An added token may rename tokens of these types: no text is merged into them.
_RENAMED = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED, TokenType.USER_DEFINED}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF describes it; `tokens`, `scores` and `types` have one entry per id."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]  # `gguf.TokenType`
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    more_end_ids: tuple[int, ...]  # more tokens that end a generation; GGUF has keys for two
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    prepend_scheme: str | None  # see fiddler.text.vocabulary.PREPEND_SCHEME
    in_text_ids: tuple[int, ...]  # see fiddler.text.vocabulary.IN_TEXT_IDS
    byte_level: ByteLevelKeys | None
    added_token_ids: Mapping[str, tuple[int, ...]]  # by option; see fiddler.text.vocabulary.ADDED_TOKEN_IDS
    chat_template: str | None
    more_templates: Mapping[str, str]  # by name: tool_use, rag
    source_warnings: tuple[str, ...]  # lines for the user about files that disagree

    def metadata(self) -> dict[str, str | bool | int | list[str] | NDArray[np.float32] | NDArray[np.int32]]:
        """GGUF keys -> values: `int` is uint32, arrays have their type in the file."""
        names = gguf.Keys.Tokenizer
        eot, eom = (*self.more_end_ids, None, None)[:2]
        values = {
            names.MODEL: "llama" if self.byte_level is None else "gpt2",
            names.LIST: list(self.tokens),
            **self._kind(),
            names.TOKEN_TYPE: np.array(self.types, np.int32),
            names.BOS_ID: self.bos_id,
            names.EOS_ID: self.eos_id,
            names.EOT_ID: eot,
            names.EOM_ID: eom,
            names.UNK_ID: self.unk_id,
            names.PAD_ID: self.pad_id,
            names.ADD_BOS: self.add_bos,
            names.ADD_EOS: self.add_eos,
            **{ADDED_TOKEN_IDS[option]: np.array(ids, np.int32) for option, ids in self.added_token_ids.items() if ids},
            names.CHAT_TEMPLATE: self.chat_template,
            names.CHAT_TEMPLATES: list(self.more_templates) or None,
        } | {names.CHAT_TEMPLATE_N.format(name=name): text for name, text in self.more_templates.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _kind(self) -> dict[str, Any]:
        """The keys that only this kind of BPE has."""
        if self.byte_level is not None:
            return self.byte_level.to_metadata()
        names = gguf.Keys.Tokenizer
        return {
            names.PRE: "default",
            names.SCORES: np.array(self.scores, np.float32),
            names.ADD_PREFIX: self.add_space_prefix,
            PREPEND_SCHEME: self.prepend_scheme,
            IN_TEXT_IDS: np.array(self.in_text_ids, np.int32) if self.in_text_ids else None,
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines for the user about files that disagree and about differences from llama.cpp."""
        theirs: tuple[str, ...] = ()
        if self.prepend_scheme == "always":
            theirs = (
                "the tokenizer puts no space before a text that begins with one; fiddler follows it, llama.cpp does "
                "not, so such prompts get other ids there",
            )
        elif self.prepend_scheme == "first":
            theirs = (
                "the tokenizer puts no space after a special token; fiddler follows it, llama.cpp does not: for a chat "
                "give it --override-kv tokenizer.ggml.add_space_prefix=bool:false",
            )
        return self.source_warnings + theirs

    def write_to(self, writer: gguf.GGUFWriter) -> None:
        """Add these keys to a GGUF writer."""
        for key, value in self.metadata().items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_array(key, value if isinstance(value, list) else value.tolist())


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer of a Hugging Face folder, padded with unused tokens to `vocab_size`.

    The ids are those of transformers' AutoTokenizer; `warnings` name what contradicts them. Raises CheckpointError if
    there is no tokenizer, a file is malformed or contradicts another, there are more than `vocab_size` tokens, or
    llama.cpp's `llama` tokenizer cannot give the same ids.
    """
    if vocab_size > LARGEST_VOCABULARY:  # before a list of that length is made
        raise CheckpointError(
            f"{folder}: vocab_size in config.json is {vocab_size}; at most {LARGEST_VOCABULARY} tokens convert"
        )
    settings, tokenizer_json = TokenizerSettings(folder), TokenizerJson(folder / "tokenizer.json")
    pieces, warnings = read_pieces(folder, settings, tokenizer_json)
    added = settings.added(tokenizer_json.added)
    by_id = _with_added(pieces, added)
    _check_ids(folder, by_id, vocab_size)
    ids = {piece.text: index for index, piece in by_id.items()}
    special = {name: settings.special_id(name, pieces.names, ids, vocab_size) for name in ("bos", "eos", "unk", "pad")}
    if special["eos"] is None:
        raise CheckpointError(
            f"{folder}: no file names the token that ends a text; set eos_token in tokenizer_config.json"
        )
    for name, kind in (("bos", TokenType.CONTROL), ("eos", TokenType.CONTROL), ("unk", TokenType.UNKNOWN)):
        index = special[name]
        if index in by_id and by_id[index].type in _names_text(pieces):
            by_id[index] = by_id[index]._replace(type=kind)
    entries = _padded(by_id, vocab_size)
    templates = settings.chat_templates()
    for name, text in templates.items():
        if (lone := _SURROGATE.search(text)) is not None:
            raise CheckpointError(
                f"{folder}: the chat template {quoted(name, 40)} holds {quoted(lone[0])}, which is no character; "
                "download the tokenizer's files again"
            )
    add_bos, add_eos = _adds(settings, tokenizer_json, warnings)
    return Vocabulary(
        tokens=tuple(piece.text for piece in entries),
        scores=tuple(piece.score for piece in entries),
        types=tuple(int(piece.type) for piece in entries),
        bos_id=special["bos"],
        eos_id=special["eos"],
        unk_id=special["unk"],
        pad_id=special["pad"],
        more_end_ids=settings.more_end_ids(special["eos"], vocab_size),
        add_bos=add_bos and special["bos"] is not None,
        add_eos=add_eos,
        add_space_prefix=pieces.add_space_prefix,
        prepend_scheme=pieces.prepend_scheme,
        in_text_ids=tuple(sorted(pieces.in_text_ids - {token.id for token in added})),
        byte_level=pieces.byte_level,
        added_token_ids=_by_option(added, by_id, pieces.byte_level is not None),
        chat_template=templates.pop("default", None),
        # names as the gguf package writes them: letters, digits and _
        more_templates={re.sub("[^A-Za-z0-9]", "_", name): templates[name] for name in sorted(templates) if name},
        source_warnings=tuple(warnings),
    )


def _names_text(pieces: Pieces) -> set[TokenType]:
    """The types of tokens that are no text once BOS, EOS or the unknown token is one of them.

    In byte-level BPE no ordinary token is: a configuration's id may be any letter's.
    """
    return {TokenType.USER_DEFINED} if pieces.byte_level else {TokenType.NORMAL, TokenType.USER_DEFINED}


def _adds(settings: TokenizerSettings, tokenizer_json: TokenizerJson, warnings: list[str]) -> tuple[bool, bool]:
    """Whether BOS and EOS are added to a text: tokenizer.json's template decides, as in transformers."""
    template = tokenizer_json.adds()
    if template is None:
        return settings.flag("add_bos_token", True), settings.flag("add_eos_token", False)
    for name, adds in template.items():
        if settings.flag(f"add_{name}_token", adds) != adds:
            warnings.append(
                f"tokenizer_config.json says add_{name}_token {str(not adds).lower()}, but tokenizer.json "
                f"{'adds' if adds else 'does not add'} it; tokenizer.json is followed, as in transformers"
            )
    return template["bos"], template["eos"]


def _with_added(pieces: Pieces, added: Iterable[AddedToken]) -> dict[int, Piece]:
    by_id = dict(pieces.by_id)
    for token in added:
        known = by_id.get(token.id)
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        text = token.text
        if known is not None and known.type == TokenType.USER_DEFINED and known.text == text.replace(SPACE, " "):
            text = known.text
        if known is not None and known.text != token.text and known.type not in _RENAMED:
            raise CheckpointError(
                f"{pieces.source}: token {token.id} is {quoted(known.text, 60)}, but an added token "
                f"{quoted(token.text, 60)} claims its id; download the tokenizer's files again"
            )
        if known is not None and known.type in _FIXED:
            by_id[token.id] = known._replace(text=text)
        else:
            by_id[token.id] = Piece(text, _ADDED_SCORE, kind)
    return by_id


def _by_option(added: Iterable[AddedToken], by_id: Mapping[int, Piece], byte_level: bool) -> dict[str, tuple[int, ...]]:
    """The ids of the added tokens with each option. SentencePiece's kind is matched before white space changes."""
    recognised = [token for token in added if by_id[token.id].type not in (TokenType.NORMAL, TokenType.BYTE)]
    return {
        option: tuple(sorted(token.id for token in recognised if option in token.options))
        for option in ADDED_TOKEN_IDS
        if byte_level or option != "normalized"
    }


def _check_ids(folder: Path, by_id: Mapping[int, Piece], vocab_size: int) -> None:
    count = max(by_id) + 1
    if count > vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {count} tokens, but vocab_size in config.json is {vocab_size}; "
            "use the tokenizer that belongs to these weights"
        )
    ids: dict[str, int] = {}
    for index, piece in by_id.items():
        if not piece.text or _IMPOSSIBLE.search(piece.text):
            raise CheckpointError(
                f"{folder}: token {index} is {quoted(piece.text, 60)}; llama.cpp cannot hold such a name"
            )
        if len(piece.text) > LONGEST_TOKEN:
            raise CheckpointError(
                f"{folder}: token {index} is {len(piece.text)} characters long; at most {LONGEST_TOKEN} convert"
            )
        if ids.setdefault(piece.text, index) != index:
            raise CheckpointError(
                f"{folder}: tokens {ids[piece.text]} and {index} are both called {quoted(piece.text, 60)}, "
                "which llama.cpp does not load; rename one of them"
            )


def _padded(by_id: Mapping[int, Piece], vocab_size: int) -> list[Piece]:
    texts = {piece.text for piece in by_id.values()}
    entries = []
    for index in range(vocab_size):
        name = f"[PAD{index}]"
        while name in texts:
            name += "_"
        entries.append(by_id.get(index, Piece(name, _UNUSED_SCORE, TokenType.UNUSED)))
    return entries

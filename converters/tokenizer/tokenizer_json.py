"""Reads `tokenizer.json`, the `tokenizers` library's format, where llama.cpp's tokenizers give the same ids.

The library is the format's only specification (https://github.com/huggingface/tokenizers). Knows vocabulary, merges
and added tokens; not the forms of white space (`white_space`), the rest of byte-level BPE (`byte_level`), nor the other
files of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fiddler.converters.json_object import read_object
from fiddler.converters.tokenizer.added_token import AddedToken, added_tokens
from fiddler.converters.tokenizer.byte_level import byte_level_pieces, is_byte_level
from fiddler.converters.tokenizer.merges import scores_from_merges
from fiddler.converters.tokenizer.pieces import BYTE_NAMES, SPACE, Piece, Pieces
from fiddler.converters.tokenizer.steps import steps_of
from fiddler.converters.tokenizer.white_space import WhiteSpace, white_space
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import present
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import LARGEST_VOCABULARY, LONGEST_TOKEN

__all__ = ["TokenizerJson"]

_MOST_CHARACTERS = 1 << 22  # of all tokens together: twice as many as the largest vocabularies have
_REMEDY = "put the model's SentencePiece tokenizer.model beside it"


class TokenizerJson:
    """One `tokenizer.json` and its added tokens; a missing file counts as empty."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is no JSON object or its added tokens are malformed."""
        self.source = str(path)
        self._root = read_object(path, _REMEDY) if present(path) else {}
        self.added = added_tokens(self._root.get("added_tokens"), f"{path}: added_tokens")

    @property
    def complete(self) -> bool:
        """Whether the file holds a vocabulary, not added tokens alone."""
        return "model" in self._root

    def texts(self) -> dict[int, str]:
        """The tokens of the file by id, added ones included. Raises CheckpointError for a malformed vocabulary."""
        vocab = self._vocab(self._object(self._root.get("model"), "model").get("vocab"))
        return {index: text for text, index in vocab.items()} | {token.id: token.text for token in self.added}

    @property
    def byte_level(self) -> bool:
        """Whether the file is of byte-level BPE."""
        return is_byte_level(self._root)

    def adds(self) -> dict[str, bool] | None:
        """Whether the post-processor adds "bos" and "eos" to a text; None if there is no template for that.

        Byte-level BPE without a template adds nothing, as in transformers.
        """
        steps = steps_of(self._root.get("post_processor"), "processors")
        template = next((step for step in steps if step.get("type") == "TemplateProcessing"), None)
        if template is None:
            return {"bos": False, "eos": False} if self.byte_level else None
        single = _list(template.get("single"))
        special = [isinstance(part, dict) and "SpecialToken" in part for part in single]
        return {"bos": special[:1] == [True], "eos": len(special) > 1 and special[-1]}

    def pieces(self) -> Pieces:
        """The tokens, in SentencePiece's kind with scores in place of merges.

        Raises CheckpointError that names the obstacle if llama.cpp's tokenizer would give other ids.
        """
        model = self._object(self._root.get("model"), "model")
        if self.byte_level:
            return byte_level_pieces(self._root, model, self._vocab(model.get("vocab")), self.source)
        kind = model.get("type", "BPE")
        if kind != "BPE":
            raise self._refused(f"its model is {quoted(kind, 40)}, not BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise self._refused(f"model.{key} is {quoted(model[key], 40)}")
        if model.get("byte_fallback") is not True:
            raise self._refused("model.byte_fallback is not true")
        space = white_space(self._root.get("normalizer"), self._root.get("pre_tokenizer"), self._refused)
        vocab = self._vocab(model.get("vocab"))
        missing = [name for name in BYTE_NAMES if name not in vocab]
        if missing:
            raise self._refused(f"its vocabulary lacks {len(missing)} byte tokens, {missing[0]} among them")
        unknown = model.get("unk_token")
        added = {token.text: token for token in self.added}
        self._check_added(space)
        in_text = self._in_text(space, vocab, added)
        reserved = {*BYTE_NAMES, *added, *in_text, *([unknown] if isinstance(unknown, str) else [])}
        ordinary = [text for text in vocab if text not in reserved and " " not in text]  # " " became "▁" in every text
        if space.splits:
            self._check_split(ordinary)
        ignore_merges = model.get("ignore_merges") is True
        ranks = self._ranks(model.get("merges"), vocab, reserved, added)
        scores = scores_from_merges(ordinary, ranks, source=self.source, ignore_merges=ignore_merges)
        by_id: dict[int, Piece] = {}
        for text, index in vocab.items():
            piece_type = (
                TokenType.BYTE if text in BYTE_NAMES else TokenType.UNKNOWN if text == unknown else TokenType.NORMAL
            )
            if text in in_text:
                text, piece_type = text.replace(SPACE, " "), TokenType.USER_DEFINED
            by_id[index] = Piece(text, scores.get(text, 0.0), piece_type)
        names = {"unk": unknown} if isinstance(unknown, str) else {}
        in_text_ids = frozenset(vocab[text] for text in in_text)
        prefix, scheme = space.add_space_prefix, space.prepend_scheme
        return Pieces(self.source, by_id, names, prefix, scheme, in_text_ids=in_text_ids)

    def _refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {reason}, which llama.cpp's llama tokenizer cannot follow; {_REMEDY}")

    def _object(self, value: object, name: str) -> dict[str, object]:
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.source}: {name} is {quoted(value, 40)}; it must be an object")
        return value

    def _vocab(self, value: object) -> dict[str, int]:
        vocab = self._object(value, "model.vocab")
        texts: dict[int, str] = {}
        for text, index in vocab.items():
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < LARGEST_VOCABULARY:
                raise CheckpointError(f"{self.source}: the token {quoted(text, 40)} has the id {quoted(index, 40)}")
            if len(text) > LONGEST_TOKEN:
                raise CheckpointError(
                    f"{self.source}: token {index} is {len(text)} characters long; at most {LONGEST_TOKEN} convert"
                )
            if texts.setdefault(index, text) != text:
                raise CheckpointError(
                    f"{self.source}: {quoted(texts[index], 40)} and {quoted(text, 40)} both have id {index}"
                )
        characters = sum(map(len, texts.values()))
        if characters > _MOST_CHARACTERS:
            raise CheckpointError(
                f"{self.source}: its tokens have {characters} characters; at most {_MOST_CHARACTERS} convert"
            )
        return {text: index for index, text in texts.items()}

    def _ranks(
        self, value: object, vocab: dict[str, int], reserved: set[str], added: dict[str, AddedToken]
    ) -> dict[tuple[str, str], int]:
        """Each pair's rank; of a pair that is listed twice the last one, as in the library."""
        if not isinstance(value, list):
            raise CheckpointError(f"{self.source}: model.merges is {quoted(value, 40)}; it must be a list")
        ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(value):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise CheckpointError(f"{self.source}: merge {rank} is {quoted(merge, 60)}; it must be two tokens")
            left, right = pair
            for text in (left, right, left + right):
                if text not in vocab:
                    raise CheckpointError(f"{self.source}: merge {rank} needs {quoted(text, 60)}, which is no token")
                if text not in reserved:
                    continue
                # An added token takes no part in merges: it is cut out of the text first, unless it is matched in
                # another form of the text than merges see.
                if text not in added or SPACE in text or not added[text].plain or added[text].normalized:
                    raise self._refused(f"merge {rank} has to do with {quoted(text, 60)}")
            ranks[left, right] = rank
        if len(value) > LARGEST_VOCABULARY:
            raise self._refused(f"it has {len(value)} merges")
        return ranks

    def _check_split(self, ordinary: Iterable[str]) -> None:
        for text in ordinary:
            if SPACE in text[1:]:
                raise self._refused(f"its pre-tokenizer splits text at spaces, but {quoted(text, 40)} is a token")

    def _in_text(self, space: WhiteSpace, vocab: dict[str, int], added: dict[str, AddedToken]) -> set[str]:
        for text in space.in_text:
            if text not in vocab:
                raise self._refused(f"its pre-tokenizer splits at {quoted(text, 40)}, which is no token")
        return {text for text in space.in_text if text not in added}

    def _check_added(self, space: WhiteSpace) -> None:
        changes = space.normalizes and space.add_space_prefix
        for token in self.added:
            if not token.special and token.normalized and changes:
                raise self._refused(f"the added token {quoted(token.text, 60)} sets normalized")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []

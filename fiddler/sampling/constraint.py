"""Constrained output: which tokens may come next, so that the text follows a JSON schema or a grammar.

The grammars are the `llguidance` library's (https://github.com/guidance-ai/llguidance), an optional extra; this file
passes it the model's tokens and gets one mask a step from it. JSON schemas: its large subset; an unknown keyword is an
error, not ignored. Grammars: llama.cpp's GBNF, converted, or the library's own variety of Lark. Knows tokens and their
bytes; no model and no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fiddler.errors import FiddlerError, RequestError, quoted
from fiddler.sampling.grammar_compiler import check, compiled, one_line
from fiddler.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Constraint", "TokenGuide", "Vocabulary"]

_BLANKS = r"[ ]?|\n{1,2}[ \t]{0,20}"
"""Between the parts of JSON, as in llama.cpp's own grammars: bounded, so that no model writes blanks for ever."""

_LARGEST = 1 << 20  # of a schema or a grammar [characters]
_LARGE = (
    1 << 15
)  # a schema up to here takes some 0.1 s to check at most, a larger one is checked in a process [characters]
_MOST_ITEMS = 10_000  # of the library's parser in one step: more take seconds, and 500 optional properties need no more


@dataclass(frozen=True)
class Constraint:
    """A language that a text must follow. Make one with `json_schema` or `grammar`, which check it, for any engine."""

    source: str  # in the library's own form

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Constraint:
        """JSON that is valid by a schema: its text, or the result of `json.loads` on it.

        Properties come in the schema's order. Blanks between the parts: one, or one or two line breaks with up to
        20 blanks or tabs. Raises RequestError with the library's reason where the schema is malformed, cannot be met,
        or has a keyword that the library does not know.
        """
        matcher = _library().LLMatcher
        try:
            if isinstance(schema, str):
                _check_length("the JSON schema", schema)
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            if parsed is True:
                parsed = {}  # the same schema, in a form that can carry our rule for blanks
            text = json.dumps(parsed)
            _check_length("the JSON schema", text)
            source = matcher.grammar_from_json_schema(
                text, defaults={"whitespace_flexible": True, "whitespace_pattern": _BLANKS}
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be read: {one_line(error)}") from None
        if len(source) > _LARGE:
            return cls(compiled(source, "the JSON schema"))
        check(source, "the JSON schema")
        return cls(source)

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """A text of a grammar's language: GBNF where `text` has rules with `::=`, else the library's Lark.

        As in lexers, a rule that is a regular expression matches as much as it can: behind `[a-z]+` as a rule of its
        own, an `x` cannot follow. Raises RequestError with the library's reason where `text` cannot be read, and where
        that takes more than two seconds.
        """
        _library()  # or the line that says what to install
        if not isinstance(text, str):
            raise RequestError(f"the grammar is {quoted(text)}; give its text")
        _check_length("the grammar", text)
        return cls(compiled(text, "the grammar"))


class Vocabulary:
    """A tokenizer's tokens as the library takes them. Make it once a model: it takes a moment."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = _library()
        self.end_ids = tokenizer.end_ids
        wrapped = library.TokenizerWrapper(_Tokens(tokenizer))
        self._tokens = library.LLTokenizer(wrapped, tokenizer.vocab_size, sorted(tokenizer.end_ids))

    def guide(self, constraint: Constraint) -> TokenGuide:
        """The state of `constraint` at the beginning of a text. Raises RequestError where no text can follow it."""
        library = _library()
        limits = library.LLParserLimits(verbose_errors=False, step_max_items=_MOST_ITEMS)
        guide = TokenGuide(library.LLMatcher(self._tokens, constraint.source, log_level=0, limits=limits), self.end_ids)
        guide.allowed()
        return guide


class TokenGuide:
    """The state of a constraint after the text so far: one a generation."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._allowed: np.ndarray | None = None

    def copy(self) -> TokenGuide:
        """A copy whose state advances independently."""
        return TokenGuide(self._matcher.deep_copy(), self._end_ids)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        allowed = self.allowed()
        return int(np.count_nonzero(allowed)) == sum(bool(allowed[token]) for token in self._end_ids)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: bool [V]; among them end tokens where the text may end.

        Raises RequestError where the library gives up: the grammar is too large, or has no text that goes on.
        """
        if self._allowed is None:
            self._allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
            self._check()
        return self._allowed

    def advance(self, token: int) -> None:
        """Advance the state by the chosen `token`, one of the allowed. An end token changes nothing."""
        if token in self._end_ids:
            return
        self._matcher.consume_token(token)
        self._check()
        self._allowed = None

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = one_line(self._matcher.get_error())
            if reason.startswith("NoExtension"):
                reason = "nothing can follow here, not even an end; does a rule begin with itself?"
            raise RequestError(f"the constraint cannot be followed: {reason}")


class _Tokens:
    """A tokenizer with the attribute names that the library looks for.

    A token without text begins with the byte 0xFF, which marks it as special: no grammar reaches it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = tokenizer.pieces()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [piece or b"\xff[%d]" % token for token, piece in enumerate(pieces)]
        self._byte_ids = {
            piece: token for token, piece in enumerate(pieces) if tokenizer.token(token).startswith("<0x")
        }

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that the grammar forces, as the model would write it: without a space before it.

        Where SentencePiece changes a text, as it does a U+2581, the ids are those of its bytes.
        """
        data = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(data, continuing=True)
        if b"".join([self.tokens[token] for token in ids]) == data:
            return ids
        return [self._byte_ids[bytes([byte])] for byte in data]


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise FiddlerError(
            "constrained output needs the llguidance package: pip install 'fiddler-moe[constrain]'"
        ) from None
    return llguidance


def _check_length(kind: str, text: str) -> None:
    if len(text) > _LARGEST:
        raise RequestError(f"{kind} has {len(text)} characters; at most {_LARGEST} are read")

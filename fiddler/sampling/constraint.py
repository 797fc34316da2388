"""Constrained output: which tokens may come next, so that the text follows a JSON schema or a grammar.

The grammars are the `llguidance` library's (https://github.com/guidance-ai/llguidance), an optional extra; a process of
its own gives it the model's tokens and computes one mask a step. JSON schemas: its large subset; an unknown keyword is
an error, not ignored. Grammars: llama.cpp's GBNF, converted, or the library's own variety of Lark. Knows tokens; no
model and no files.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fiddler.errors import FiddlerError, RequestError, quoted
from fiddler.sampling.grammar_compiler import BLANKS, compiled, one_line
from fiddler.sampling.mask_process import MaskProcess
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Constraint", "TokenGuide", "Vocabulary", "json_rule", "schema_text"]

_LARGEST = 1 << 20  # of a schema or a grammar [characters]


@dataclass(frozen=True)
class Constraint:
    """A language that a text must follow. Make one with `json_schema` or `grammar`, which check it, for any engine."""

    source: str  # in the library's own form

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise RequestError(f"the constraint's source is {quoted(self.source)}; give its text")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Constraint:
        """JSON that is valid by a schema: its text, or the result of `json.loads` on it.

        Properties come in the schema's order. Blanks between the parts: one, or one or two line breaks with up to
        20 blanks or tabs. Raises RequestError with the library's reason where the schema is malformed, cannot be met,
        or has a keyword that the library does not know.
        """
        _library()  # or the line that says what to install
        return cls(compiled(schema_text(schema), "the JSON schema"))

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


def schema_text(schema: str | Mapping[str, Any]) -> str:
    """A schema as JSON that the library takes. Raises RequestError where it is none, or too long."""
    try:
        if isinstance(schema, str):
            _check_length("the JSON schema", schema)
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if parsed is True:
            parsed = {}  # the same schema, in a form that can carry our rule for blanks
        text = json.dumps(parsed)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be read: {one_line(error)}") from None
    _check_length("the JSON schema", text)
    return text


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON of a schema as a part of a Lark rule, with the same blanks as `Constraint.json_schema`."""
    blanks = {"whitespace_flexible": True, "whitespace_pattern": BLANKS}
    return f"%json {json.dumps({**schema, 'x-guidance': blanks})}"


class Vocabulary:
    """A tokenizer's tokens, for masks over them. Make it once a model: it starts a process when it is first used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        _library()  # or the line that says what to install
        self._size, self._end_ids = tokenizer.vocab_size, tokenizer.end_ids
        self._process = MaskProcess(tokenizer)

    def guide(self, constraint: Constraint) -> TokenGuide:
        """The state of `constraint` at the beginning of a text.

        Raises RequestError where no text can follow it, or the first token takes too long to find.
        """
        guide = TokenGuide(self._process, constraint.source, self._size, self._end_ids)
        guide.allowed()
        return guide


class TokenGuide:
    """The state of a constraint after the text so far: one a generation. The masks come from a process with limits."""

    def __init__(self, process: MaskProcess, source: str, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._process, self._source, self._size, self._end_ids = process, source, vocab_size, end_ids
        self._tokens: list[int] = []
        self._allowed: np.ndarray | None = None
        self._number = process.new()
        weakref.finalize(self, process.drop, self._number)

    def copy(self) -> TokenGuide:
        """A copy whose state advances independently."""
        copied = TokenGuide(self._process, self._source, self._size, self._end_ids)
        copied._tokens, copied._allowed = self._tokens.copy(), self._allowed
        self._process.copy(self._number, copied._number)
        return copied

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        allowed = self.allowed()
        return int(np.count_nonzero(allowed)) == sum(bool(allowed[token]) for token in self._end_ids)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: bool [V]; among them end tokens where the text may end.

        Raises RequestError where there are none, where the library gives up because the grammar is too large, and where
        the masks of a text take more than two seconds and 50 ms a token.
        """
        if self._allowed is None:
            try:
                bits = self._process.mask(self._number, self._source, self._tokens)
            except RequestError as error:
                reason = str(error)
                if reason.startswith("NoExtension"):
                    reason = "nothing can follow here, not even an end; does a rule begin with itself?"
                raise RequestError(f"the constraint cannot be followed: {reason}") from None
            self._allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._size, bitorder="little") != 0
        return self._allowed

    def advance(self, token: int) -> None:
        """Advance the state by the chosen `token`, one of the allowed. An end token changes nothing."""
        if token in self._end_ids:
            return
        self._tokens.append(token)
        self._allowed = None


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

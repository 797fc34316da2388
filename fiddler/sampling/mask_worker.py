"""The process that computes token masks, under limits that the operating system enforces.

A grammar comes from a stranger, and `llguidance`'s limits bound the items of its parser, not the time: of 1,000
alternatives that begin with the whole grammar, the first mask takes 12 s. So each guide has an account of CPU time: it
holds `seconds` at most and earns 50 ms a mask, and whoever overdraws it ends the process. Memory beyond that at the
start is limited too. Messages: see `main`. Knows tokens as bytes and ids; asks the parent to encode a text.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from typing import Any, BinaryIO

import llguidance

from fiddler.sampling.process_limits import end_on_timer, limit_memory

__all__ = ["main"]

_EARNED = 0.05  # CPU time that a guide earns a mask [s]
_MOST_ITEMS = 10_000  # of the library's parser in one step: more take seconds, and 500 optional properties need no more


def main(seconds: float, memory: int) -> None:
    """Answer messages until there are no more. Each is its length (uint32, little-endian) and its bytes.

    The first is a vocabulary as JSON: tokens (their bytes as Latin-1), BOS, EOS, end ids. Then come JSON lists:
    ["mask", guide, new tokens, source or null]; ["copy", new guide, guide]; ["drop", guides]. A mask's answer is "m"
    and a bit a token, or "e" and the library's reason in UTF-8. Before any answer may come "q" and a text: the next
    message has its ids, as JSON.
    """
    end_on_timer()
    pipe = _Pipe()
    tokens, bos_id, eos_id, end_ids = json.loads(pipe.read())
    wrapped = llguidance.TokenizerWrapper(_Tokens(tokens, bos_id, eos_id, pipe))
    tokenizer = llguidance.LLTokenizer(wrapped, len(tokens), end_ids)
    pipe.write(b"m")
    limit_memory(memory)
    guides: dict[int, _Guide] = {}
    try:
        while message := pipe.read():
            kind, *values = json.loads(message)
            if kind == "drop":
                for guide in values[0]:
                    guides.pop(guide, None)
            elif kind == "copy":
                guides[values[0]] = guides[values[1]].copy()
            else:
                guide, new, source = values
                if source is not None:
                    guides[guide] = _Guide(seconds)
                pipe.write(guides[guide].mask(tokenizer, new, source))
    except MemoryError:
        os.abort()  # as where the library finds no memory


class _Guide:
    """The state of one constraint, and its account of CPU time [s]."""

    def __init__(self, seconds: float) -> None:
        self._matcher: llguidance.LLMatcher | None = None
        self._most = self._left = seconds

    def copy(self) -> _Guide:
        copied = _Guide(self._most)
        assert self._matcher is not None
        copied._matcher, copied._left = self._matcher.deep_copy(), self._left
        return copied

    def mask(self, tokenizer: llguidance.LLTokenizer, new: list[int], source: str | None) -> bytes:
        """The answer to a mask's message."""
        self._left = min(self._left + _EARNED, self._most)
        signal.setitimer(signal.ITIMER_PROF, self._left)
        if source is not None:
            limits = llguidance.LLParserLimits(verbose_errors=False, step_max_items=_MOST_ITEMS)
            self._matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
        matcher = self._matcher
        assert matcher is not None
        matcher.consume_tokens(new)
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        self._left = signal.setitimer(signal.ITIMER_PROF, 0)[0]  # what was left of it
        return b"e" + matcher.get_error().encode() if matcher.is_error() else b"m" + bits


class _Pipe:
    """Messages on standard input and output."""

    def __init__(self) -> None:
        self._requests: BinaryIO = os.fdopen(0, "rb")
        self._answers: BinaryIO = os.fdopen(1, "wb")

    def read(self) -> bytes:
        """The next message; empty where none comes any more."""
        head = self._requests.read(4)
        return self._requests.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""

    def write(self, answer: bytes) -> None:
        self._answers.write(struct.pack("<I", len(answer)) + answer)
        self._answers.flush()


class _Tokens:
    """A tokenizer with the attribute names that the library looks for."""

    def __init__(self, tokens: list[str], bos_id: int, eos_id: int, pipe: _Pipe) -> None:
        self.tokens = [token.encode("latin-1") for token in tokens]
        self.bos_token_id, self.eos_token_id, self._pipe = bos_id, eos_id, pipe

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that the grammar forces."""
        self._pipe.write(b"q" + (text.encode() if isinstance(text, str) else text))
        ids: Any = json.loads(self._pipe.read())
        return list(ids)

"""Looks for stop strings in the texts of beams, a token at a time: a beam that forks is not decoded anew. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fiddler.generation.stop_strings import StopStrings
from fiddler.text.tokenizer import Tokenizer

__all__ = ["BeamText", "BeamTexts"]


class BeamText(NamedTuple):
    """The end of a beam's text.

    pending: its last tokens whose bytes are no whole character yet. matched: a state of `StopStrings`.
    """

    pending: tuple[int, ...]
    matched: tuple[int, ...]
    stopped: bool = False


class BeamTexts:
    """Texts of beams that stop strings end; without any, no token is decoded."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, StopStrings(stops)
        self.start = BeamText((), self._stops.start)

    def extended(self, text: BeamText, token: int) -> BeamText:
        """A beam's text after one more token."""
        if not text.matched or not self._tokenizer.stream(continuing=True).push_bytes(token):
            return text
        stream = self._tokenizer.stream(continuing=True)
        for each in text.pending:
            stream.push(each)
        piece = stream.push(token)
        matched, match = self._stops.advance(text.matched, piece)
        # where the token completes a character, it alone has the bytes of the next
        pending = (token,) if piece else (*text.pending, token)
        return BeamText(pending if stream.finish() else (), matched, match is not None)

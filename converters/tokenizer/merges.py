"""Ranked merges (the `tokenizers` library's BPE) turned into scores (SentencePiece's BPE), where that can be
exact.

Both cut a text into characters and keep merging the best adjacent pair, leftmost first. They differ in what
may be merged: the `tokenizers` library only pairs that are listed, by rank; SentencePiece and llama.cpp any
two whose concatenation is a token, by that token's score. This file decides when the two agree on every text.
It knows no files.

Why the test below suffices. Whether and in which order two characters inside a stretch of text get merged
depends on that stretch alone for as long as no merge crosses its ends. So wherever `l` and `r` stand side by
side and `l + r` is the token `x`, merging `x` alone also comes to exactly `[l, r]`. If `x` alone ends as
`[x]`, its last merge is the one pair that ever makes `x`, and its rank can be the token's score. If it ends
as three symbols or more, no pair that makes `x` ever arises, in either algorithm. Only if it ends as two
symbols do they part: one merges them, one does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from fiddler.errors import CheckpointError, quoted

__all__ = ["scores_from_merges"]


def scores_from_merges(
    tokens: Iterable[str], ranks: Mapping[tuple[str, str], int], *, source: str, ignore_merges: bool = False
) -> dict[str, float]:
    """A score for each ordinary token that makes SentencePiece's algorithm merge as `ranks` does.

    `ranks` holds each pair's place in the list of merges. With `ignore_merges` a text that is a token as a
    whole is not merged at all, so each token must be what its merges give. Raises CheckpointError, its
    message beginning with `source`, where some text would get other ids.
    """
    scores: dict[str, float] = {}
    never = -float(max(ranks.values(), default=0) + 1)
    for token in tokens:
        symbols, rank = _merge(token, ranks)
        if len(symbols) == 2:
            raise CheckpointError(
                f"{source}: its merges never join {quoted(symbols[0], 40)} and {quoted(symbols[1], 40)}, "
                f"although {quoted(token, 40)} is a token: llama.cpp's tokenizer would; "
                "put the model's SentencePiece tokenizer.model beside it"
            )
        if len(symbols) > 1 and ignore_merges:
            raise CheckpointError(
                f"{source}: ignore_merges is set and its merges do not build {quoted(token, 40)}, "
                "so llama.cpp's tokenizer would give other ids; "
                "put the model's SentencePiece tokenizer.model beside it"
            )
        scores[token] = never if rank is None or len(symbols) > 1 else -float(rank)
    return scores


def _merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], int | None]:
    """What becomes of `token` alone, and the rank of the last merge."""
    symbols, last = list(token), None
    while True:
        best: tuple[int, int] | None = None  # rank, place
        for place, pair in enumerate(pairwise(symbols)):
            rank = ranks.get(pair)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, place
        if best is None:
            return symbols, last
        last, place = best
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]

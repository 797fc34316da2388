"""Turns ranked merges (the `tokenizers` library's BPE) into scores (SentencePiece's BPE), where that is exact.

Both algorithms cut a text into characters and repeatedly merge the best adjacent pair, leftmost first. They differ in
the pairs they may merge: the `tokenizers` library only those in its list of merges, by rank; SentencePiece and
llama.cpp any pair whose concatenation is a token, by that token's score. This file decides whether both agree on every
text. It knows no files.

Proof that the test below suffices. Whether and in which order two characters inside a stretch of text are merged
depends on that stretch alone as long as no merge crosses its ends. So wherever `l` and `r` are adjacent and `l + r` is
the token `x`, merging `x` alone also reaches exactly `[l, r]`. If `x` alone ends as `[x]`, its last merge is the only
pair that ever makes `x`: that pair's rank can be the token's score. If it ends as three symbols or more, no pair that
makes `x` ever arises, in either algorithm. Only if it ends as two symbols do the algorithms differ: SentencePiece
merges the two, the `tokenizers` library does not.
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

    `ranks` holds each pair's index in the list of merges. With `ignore_merges` the library does not merge a text that
    is a token as a whole, so each token's merges must result in that token. Raises CheckpointError, its message
    beginning with `source`, if some text would get other ids.
    """
    scores: dict[str, float] = {}
    lowest_score = -float(max(ranks.values(), default=0) + 1)
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
        scores[token] = lowest_score if rank is None or len(symbols) > 1 else -float(rank)
    return scores


def _merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], int | None]:
    """The symbols that `token` alone is merged into, and the rank of the last merge (None: no merge)."""
    symbols, last_rank = list(token), None
    while True:
        best: tuple[int, int] | None = None  # rank, position
        for position, pair in enumerate(pairwise(symbols)):
            rank = ranks.get(pair)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, position
        if best is None:
            return symbols, last_rank
        last_rank, position = best
        symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]

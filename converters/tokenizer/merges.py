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
from heapq import heapify, heappop, heappush
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
    merges = _Merges(ranks)
    for token in tokens:
        symbols, rank = merges.apply(token)
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


class _Merges:
    """Ranked merges of numbered symbols: a pair is one number, and is found without looking at its letters."""

    def __init__(self, ranks: Mapping[tuple[str, str], int]) -> None:
        self._numbers: dict[str, int] = {}
        numbered = [(self._number(one), self._number(other), self._number(one + other)) for one, other in ranks]
        self._unknown = len(self._numbers)
        self._count = self._unknown + 1
        self._merged = {
            one * self._count + other: (rank, both)
            for (one, other, both), rank in zip(numbered, ranks.values(), strict=True)
        }

    def _number(self, symbol: str) -> int:
        return self._numbers.setdefault(symbol, len(self._numbers))

    def apply(self, token: str) -> tuple[list[str], int | None]:
        """The symbols that `token` alone is merged into, and the rank of the last merge (None: no merge).

        Takes n log n steps for n characters: a heap holds the pairs that can merge, by rank and then from the left.
        """
        end, count, merged = len(token), self._count, self._merged
        # a symbol stands at the position of its first character, -1 at the others
        symbols = [self._numbers.get(character, self._unknown) for character in token]
        heap = [
            (merge[0], position)
            for position, (one, other) in enumerate(pairwise(symbols))
            if (merge := merged.get(one * count + other)) is not None
        ]
        if not heap:
            return list(token), None
        heapify(heap)
        following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
        last_rank: int | None = None
        while heap:
            rank, position = heappop(heap)
            right = following[position]
            if symbols[position] < 0 or right == end:
                continue  # merged into the one before; or nothing is left to its right
            merge = merged.get(symbols[position] * count + symbols[right])
            if merge is None or merge[0] != rank:
                continue  # one of the two has grown since
            last_rank, symbols[position], symbols[right] = rank, merge[1], -1
            following[position] = after = following[right]
            before = previous[position]
            if after < end:
                previous[after] = position
                if (merge := merged.get(symbols[position] * count + symbols[after])) is not None:
                    heappush(heap, (merge[0], position))
            if before >= 0 and (merge := merged.get(symbols[before] * count + symbols[position])) is not None:
                heappush(heap, (merge[0], before))
        begins = [position for position, symbol in enumerate(symbols) if symbol >= 0]
        return [token[begin:stop] for begin, stop in pairwise([*begins, end])], last_rank

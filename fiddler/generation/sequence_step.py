"""One step of running sequences: how many tokens each gets, and their way through the model. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

from fiddler.generation.sequence_group import RunningSequence
from fiddler.runtime.runner import Runner

__all__ = ["compute", "tokens_per_sequence"]


def tokens_per_sequence(lacking: Sequence[int], max_tokens: int) -> list[int]:
    """How many tokens of each sequence, of the `lacking` not yet computed, go into the next step; `max_tokens` in all.

    A sequence that lacks only one token gets it: it decodes at every step, whatever prompts are read beside it. The
    rest goes to the prompts, first come first served; some may get nothing yet.
    """
    left = max_tokens - lacking.count(1)
    counts = []
    for count in lacking:
        if count == 1:
            counts.append(1)
        else:
            counts.append(max(0, min(count, left)))
            left -= counts[-1]
    return counts


def compute(runner: Runner, sequences: Sequence[RunningSequence], counts: Sequence[int]) -> None:
    """Run `counts` tokens of the sequences through the model; those that lack none afterwards get their logits.

    Where that fails, nothing has changed.
    """
    parts, rows, complete, end = [], [], [], 0
    for sequence, count in zip(sequences, counts, strict=True):
        if not count:
            continue
        assert sequence.cache is not None, "the sequence has not joined"
        cached = sequence.cache.length
        parts.append((sequence.cache, sequence.tokens[cached : cached + count]))
        end += count
        if cached + count == len(sequence.tokens):
            complete.append(sequence)
            rows.append(end - 1)
    if not parts:
        return
    lengths = [cache.length for cache, _ in parts]
    try:
        greedy = len(complete) == len(parts) == 1 and complete[0].greedy
        _, logits, largest = runner.step(parts, rows, greedy=greedy)
    except BaseException:
        for (cache, _), length in zip(parts, lengths, strict=True):
            cache.truncate(length)
        raise
    assert logits is not None
    for i, (sequence, row) in enumerate(zip(complete, logits.numpy(), strict=True)):
        sequence.logits, sequence.largest = row, -1 if largest is None else int(largest[i])

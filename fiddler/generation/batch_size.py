"""How many sequences a batch steps at once. Pure: knows numbers of tokens, sequences and seconds; no models."""

from __future__ import annotations

from fiddler.cost_curve import Curve

__all__ = ["BatchSize", "batch_size", "first_batch_size"]


def first_batch_size(experts: int, used: int) -> int:
    """The batch size at which each expert, or a model without experts, is used eight times a step on average.

    Half of it already reads every expert but one in fifty (e ** -4), so the other half costs little.
    """
    return -(-8 * max(1, experts) // max(1, used))


class BatchSize:
    """The most sequences of a step: `now`, which memory may lower; `maximum` at first."""

    def __init__(self, maximum: int) -> None:
        assert maximum >= 1, f"{maximum} sequences"
        self.now = self.maximum = maximum

    def limit(self, sequences: int) -> None:
        """Lower it to so many, but no less than 1: memory does not suffice for more sequences."""
        self.now = max(1, min(self.now, sequences))


def batch_size(parallel: int | None, chunk: int, experts: int, used: int, costs: Curve | None) -> BatchSize:
    """`parallel` sequences, or where that is None the fewest at which nearly all of the machine's speed is used.

    Those are the first batch size, or more. chunk: the most tokens of a step. costs: seconds of a step, None: unknown.
    """
    if parallel is not None:
        return BatchSize(min(parallel, chunk))
    first = first_batch_size(experts, used)
    return BatchSize(min(chunk, first if costs is None else max(first, costs.efficient(chunk))))

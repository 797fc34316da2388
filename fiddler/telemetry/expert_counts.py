"""Counts how often each expert is chosen, where a model calls its experts; reads a file of such counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fiddler.errors import RequestError
from fiddler.models.interfaces import Experts
from fiddler.models.mixtral import Mixtral

__all__ = ["CountedExperts", "counting", "read_counts"]


class CountedExperts:
    """A model's `Experts`, wherever they live, with a count of the tokens that chose each of them."""

    def __init__(self, experts: Experts, layers: int, count: int, device: torch.device) -> None:
        """count: experts a layer. device: of the router's expert ids."""
        self._experts = experts
        self._counts = torch.zeros(layers, count, dtype=torch.int64, device=device)

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """Implements `Experts`."""
        chosen = expert_ids.reshape(-1)
        self._counts[layer].index_add_(0, chosen, torch.ones_like(chosen))  # unlike bincount, waits for no GPU
        return self._experts(layer, x, expert_ids, routing_weights)

    @property
    def counts(self) -> list[list[int]]:
        """Tokens so far, [L][E]."""
        counts: list[list[int]] = self._counts.tolist()
        return counts


@contextmanager
def counting(model: Mixtral) -> Iterator[CountedExperts]:
    """Counts the experts that `model` chooses in the block.

    Steps of one token on a GPU are not counted where they run as graphs that were captured before.
    """
    config, plain = model.config, model.experts
    counted = CountedExperts(plain, config.block_count, config.expert_count, model.token_embd.device)
    model.experts = counted
    try:
        yield counted
    finally:
        model.experts = plain


def read_counts(path: Path, layers: int, experts: int) -> list[list[int]]:
    """Expert counts of a file as `fiddler perplexity --expert-counts` writes them: JSON, {"counts": [L][E]}.

    Raises RequestError, in one line that names the file, where it is no such file or is of another model's shape.
    """
    try:
        counts: list[list[int]] = json.loads(path.read_text())["counts"]
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(
            f'{path}: is no file of expert counts; it is JSON, {{"counts": [layers][experts]}}'
        ) from None
    shaped = isinstance(counts, list) and all(
        isinstance(row, list) and all(type(count) is int and count >= 0 for count in row) for row in counts
    )
    if not shaped or {len(row) for row in counts} != {experts} or len(counts) != layers:
        raise RequestError(f"{path}: does not hold counts of {layers} layers with {experts} experts each")
    return counts

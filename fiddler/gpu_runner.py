"""Runs steps where the dense part is on a GPU: several tokens through torch, one token as captured graphs.

Knows one sequence's place on the GPU, which the next sequence takes over when nobody holds the last one any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence as Ordered
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiddler.cache import Sequence
from fiddler.errors import ResourceError
from fiddler.gpu_memory import Budget, shown
from fiddler.models.mixtral import Mixtral
from fiddler.runner import Runner

if TYPE_CHECKING:
    from fiddler.gpu_decode import Decoder

__all__ = ["GpuRunner"]


class GpuRunner(Runner):
    """A `Runner` on a GPU."""

    def __init__(
        self,
        model: Mixtral,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        chunk: int,
        home: Sequence,
        budget: Budget,
    ) -> None:
        """`home`: a sequence with room for the whole context, whose storage the others use after it."""
        super().__init__(model, context, cache_dtype, threads, chunk)
        self.budget = budget
        self._storage = home.storage
        self._at_home: Callable[[], Sequence | None] = lambda: None
        self._decoder: Decoder | None = None

    def decode_with(self, decoder: Decoder) -> None:
        """Take single tokens of the sequence at home through `decoder`."""
        self._decoder = decoder

    def sequence(self) -> Sequence:
        """A new, empty sequence. The first one alive has its memory already, another one takes more."""
        home = self._at_home() is None
        made = Sequence(
            self.model.config,
            self.context,
            self._cache_dtype,
            self.model.token_embd.device,
            self._storage if home else None,
        )
        if home:
            self._at_home = weakref.ref(made)
        return made

    def step(self, parts: Ordered[tuple[Sequence, Ordered[int]]]) -> Tensor:
        """A `Runner`'s. What it returns for a single token is valid until the next step."""
        try:
            if self._decoder is None or len(parts) != 1 or len(parts[0][1]) != 1 or parts[0][0] is not self._at_home():
                return super().step(parts)
            ((sequence, tokens),) = parts
            sequence.reserve(sequence.length + 1)
            with torch.inference_mode(), self._on_threads(0):
                self._decoder.step(tokens[0], sequence.length)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the GPU's memory does not suffice within {shown(self.budget.total)}; give more --gpu-memory, or "
                "less --ctx"
            ) from error
        sequence.length += 1
        return self._decoder.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """A `Runner`'s."""
        if self._decoder is not None and hidden is self._decoder.hidden:
            return self._decoder.logits.cpu()
        return super().logits(hidden)

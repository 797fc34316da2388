"""What the GPU chose in a decode step, in pinned memory: its experts, and the token of its largest logit.

Knows positions and ids; not steps or sequences. Those of the last two positions, in turns: a step may be begun before
what the one before it chose is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fiddler.gpu import decode_kernels

__all__ = ["HostChoices"]

_PENDING = -2  # in place of a token that is not chosen yet


class HostChoices:
    """Choices of steps of single tokens; `layers` layers choose `k` experts each."""

    def __init__(self, layers: int, k: int) -> None:
        self._tokens = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self._expert_ids = torch.zeros(2, layers, max(1, k), dtype=torch.int64, pin_memory=True)
        self._next = self._tokens.numpy()

    def queue_expert_ids(self, chosen: Sequence[Tensor], token: Tensor) -> None:
        """Copy the last layers' experts, int64 [1, K] each, to the host. token: see `decode_kernels.next_token`."""
        if layers := self._expert_ids.shape[1]:
            decode_kernels.to_host_by_turns(torch.cat(list(chosen[-layers:])), token, self._expert_ids)

    def queue_token(self, logits: Tensor, token: Tensor) -> None:
        """Choose the next token, see `decode_kernels.next_token`."""
        decode_kernels.next_token(logits, token, self._tokens)

    def expect(self, position: int) -> None:
        """A token after this position is about to be chosen."""
        self._next[position % 2] = _PENDING

    def token(self, position: int, check: Callable[[], None]) -> int:
        """The token chosen after this position, -1 where not all logits are finite. check: called while it is not."""
        while (token := int(self._next[position % 2])) == _PENDING:
            check()
        return token

    def expert_ids(self, position: int) -> Tensor:
        """The experts of each layer at this position, int64 [L, K], once its logits are on the host; a copy."""
        return self._expert_ids[position % 2].clone()

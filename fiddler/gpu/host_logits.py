"""The logits of single tokens on the host: their pinned memory and their copies. Knows steps; not what is in them."""

from __future__ import annotations

import torch
from torch import Tensor

from fiddler.device import cuda_driver

__all__ = ["HostLogits"]


class HostLogits:
    """The logits of the last two steps, in turns: a step may be queued before those of the one before are read."""

    def __init__(self) -> None:
        self._slots: list[Tensor | None] = [None, None]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # recorded after their copies
        self._steps = 0

    def begin(self, like: Tensor) -> None:
        """Count a step, and see to memory for its logits; no wait may be queued that pinning it could wait for."""
        self.reserve(like)
        self._steps += 1

    def reserve(self, like: Tensor) -> None:
        """See to memory for the next step's logits, on the thread that has time for it."""
        slot = (self._steps + 1) % 2
        if self._slots[slot] is None:  # whoever got the last ones may keep them
            self._slots[slot] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, logits: Tensor) -> None:
        """Queue the copy of the logits of the step that was counted last."""
        slot, stream = self._steps % 2, torch.cuda.current_stream()
        host = self._slots[slot]
        assert host is not None
        cuda_driver.copy_to_host(host.data_ptr(), logits.data_ptr(), host.nbytes, stream.cuda_stream)
        self._copied[slot].record(stream)

    def read(self, ahead: int = 0) -> Tensor:
        """Those of the step that was counted last, or `ahead` 1 before it; once. Waits for them."""
        slot = (self._steps - ahead) % 2
        self._copied[slot].synchronize()
        host, self._slots[slot] = self._slots[slot], None
        assert host is not None, "the logits of a step are read once"
        return host

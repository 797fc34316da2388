"""Capturing CUDA graphs: the capture itself, and the KV cache that a captured step of one token attends to."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiddler.gpu import attention_kernels
from fiddler.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

__all__ = ["OneToken", "captured"]


class OneToken:
    """The model's `Cache` for one token of one sequence, whose position is read on the device."""

    def __init__(self, sequence: KVCache, position: Tensor, cos_sin: Tensor, window: int | None) -> None:
        self._keys, self._values = sequence.storage
        self._position, self._cos_sin, self._window = position, cos_sin, window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        q = attention_kernels.rotate_and_store(q, k, v, self._cos_sin, self._position, keys, values)
        return attention_kernels.attend_one(q, keys, values, self._position, self._window)


@contextmanager
def captured(pool: _POOL_HANDLE) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph, its memory from `pool`, of what is queued meanwhile in the current stream.

    Garbage is left alone until then: to free what another engine had of the driver, say its pinned memory, is what
    the driver does not allow while it captures.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:  # of one that is not ended, torch ends the process
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it may be empty as yet
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collects:
            gc.enable()

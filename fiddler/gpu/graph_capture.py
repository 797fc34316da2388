"""Captures CUDA graphs, and the KV cache that a captured decode step attends to. Knows streams; not the model."""

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

__all__ = ["DecodeCache", "captured"]


class DecodeCache:
    """The model's `Cache` for one token of one sequence, whose position kernels read on the device.

    So one captured graph serves every position.
    """

    def __init__(self, sequence: KVCache, position: Tensor, cos_sin: Tensor, window: int | None) -> None:
        self._keys, self._values = sequence.storage
        self._position, self._cos_sin, self._window = position, cos_sin, window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Implements `Cache.attend`."""
        keys, values = self._keys[layer], self._values[layer]
        q = attention_kernels.rotate_and_store(q, k, v, self._cos_sin, self._position, keys, values)
        return attention_kernels.attend_one(q, keys, values, self._position, self._window)


@contextmanager
def captured(pool: _POOL_HANDLE) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture the work queued in the current stream as a graph, with memory from `pool`.

    Python's garbage collector pauses meanwhile: it could free another engine's driver resources, such as pinned
    memory, which the driver does not allow during a capture.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:  # torch ends the process at a capture that never ended
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the graph may be empty
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collects:
            gc.enable()

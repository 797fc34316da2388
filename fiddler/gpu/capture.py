"""Captures queued work as a CUDA graph. Does not know the work."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

__all__ = ["captured"]


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

"""Quantises rows of a matrix on several threads, piece after piece. Knows formats; no files and no models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fiddler.converters.dtypes import RangeLoss, to_float32
from fiddler.converters.safetensors_file import Array
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.machine.threads import usable_cores

__all__ = ["Piece", "Quantiser"]

Piece = Callable[[], tuple[Array, NDArray[np.float32] | None]]
"""Returns rows, and the importance of each of their weights, of the same shape, if it is known."""


class Quantiser:
    """Threads that encode; `with` ends them."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or usable_cores()
        self._pool = ThreadPoolExecutor(self._threads, "quantise")

    def __enter__(self) -> Quantiser:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encoded(self, pieces: Iterator[Piece], kind: str) -> Iterator[tuple[Array, RangeLoss]]:
        """Blocks of each piece, in order, and what was no number. The pieces are called on the threads.

        At most two pieces a thread are in memory.
        """
        waiting: deque[Future[tuple[Array, RangeLoss]]] = deque()
        for piece in pieces:
            waiting.append(self._pool.submit(_encode, piece, kind))
            if len(waiting) >= 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(read: Piece, kind: str) -> tuple[Array, RangeLoss]:
    rows, importance = read()
    wide = np.ascontiguousarray(to_float32(rows))
    return BLOCK_FORMATS[kind].encode(wide, importance), RangeLoss(nans=int(np.count_nonzero(np.isnan(wide))))

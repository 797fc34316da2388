"""A thread's working memory, used again by its next call, and addresses of arrays."""

from __future__ import annotations

import threading

import numpy as np

__all__ = ["Workspace", "address_of"]


def address_of(array: np.ndarray) -> int:
    """Where an array's data begin; what `ctypes.data` says takes several times as long."""
    place: int = array.__array_interface__["data"][0]
    return place


class Workspace(threading.local):
    """A thread's memory that is used again by its next call: fresh pages cost as much as a product.

    It is as large as the largest call has needed.
    """

    def __init__(self) -> None:
        self.words = np.empty(0, np.float32)  # begins at a cache line

    def grow(self, count: int) -> np.ndarray:
        """From now on `count` words, uninitialised."""
        memory = np.empty(count + 15, np.float32)
        begin = -(memory.ctypes.data // 4) % 16
        self.words = memory[begin : begin + count]
        return self.words

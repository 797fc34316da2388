"""Per-thread workspaces that kernels reuse, and addresses of arrays. Knows nothing of their contents."""

from __future__ import annotations

import threading

import numpy as np

__all__ = ["Workspace", "address_of"]


def address_of(array: np.ndarray) -> int:
    """Address of an array's data; `ctypes.data` takes several times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


class Workspace(threading.local):
    """A thread's workspace, reused by its next call: page faults of fresh memory cost as much as a product.

    It grows to the largest call's size.
    """

    def __init__(self) -> None:
        self.words = np.empty(0, np.float32)  # aligned to a cache line

    def grow(self, count: int) -> np.ndarray:
        """Replace the workspace by one of `count` words (float32), uninitialised."""
        memory = np.empty(count + 15, np.float32)
        begin = -(memory.ctypes.data // 4) % 16
        self.words = memory[begin : begin + count]
        return self.words

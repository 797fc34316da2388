"""Compiling a product's kernels before they are needed, and again where what was kept on disk is damaged."""

from __future__ import annotations

import pickle

import numpy as np

from fiddler.kernels.expert_ffn import expert_ffn
from fiddler.kernels.jit import discard_cache
from fiddler.kernels.linear import linear
from fiddler.kernels.product import Product

__all__ = ["prepare"]

_DAMAGE = (EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, ValueError)


def prepare(product: Product) -> None:
    """Compile the kernels of `product`, or read them from the cache: seconds the first time, then a moment.

    A cache that cannot be read is removed and made anew.
    """
    try:
        _run(product)
    except _DAMAGE:
        discard_cache()
        _run(product)


def _run(product: Product) -> None:
    bits = np.zeros((1, 2, 2), np.uint16)
    x = np.zeros((1, 2), np.float32)
    linear(x, bits[0], product)
    expert_ffn(x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), bits, bits, bits, product)

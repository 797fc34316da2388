"""Compiling a product's kernels before they are needed, and again where what was kept on disk is damaged."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
from numba.core import event

from fiddler.kernels.attention import attend_each
from fiddler.kernels.expert_ffn import expert_ffn
from fiddler.kernels.jit import discard_cache
from fiddler.kernels.linear import linear
from fiddler.kernels.product import Product
from fiddler.kernels.routing import rms_norm, route

__all__ = ["prepare"]

_DAMAGE = (EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, ValueError)


class _FirstCompilation(event.Listener):
    """Calls back when Numba begins to compile, once."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def on_start(self, event: object) -> None:
        """A compilation begins."""
        if self._callback is not None:
            callback, self._callback = self._callback, None
            callback()

    def on_end(self, event: object) -> None:
        """A compilation is done."""


def prepare(product: Product, on_compile: Callable[[], None] = lambda: None) -> None:
    """Compile the kernels of `product` and what stands between the products, or read them from the cache.

    Seconds the first time, then a moment.
    `on_compile` is called, once, where there is something to compile. A cache that cannot be read is removed and
    made anew.
    """
    with event.install_listener("numba:compile", _FirstCompilation(on_compile)):
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
    kept = np.zeros((1, 1, 2), np.uint16 if product.activations == "bf16" else np.float32)
    attend_each(x[None], x[None], x[None], [kept], [kept], [0], x[0, :1])
    route(rms_norm(x, x[0], 1.0), x, 1)

"""Compiling a product's kernels before they are needed, and again where what was kept on disk is damaged."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numba.core import event

from fiddler.kernels.attention import attend_each
from fiddler.kernels.cpu import TIERS
from fiddler.kernels.expert_ffn import expert_ffn
from fiddler.kernels.grouped import compile_grouped_products
from fiddler.kernels.jit import discard_cache, kept_on_disk
from fiddler.kernels.linear import linear
from fiddler.kernels.matmul import block_product
from fiddler.kernels.product import Product
from fiddler.kernels.routing import rms_norm, route
from fiddler.kernels.threads import usable_cores

__all__ = ["prepare", "prepare_other_half"]

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

    Seconds the first time, then a moment. Another process compiles half of it, where there is a core for that.
    `on_compile` is called, once, where there is something to compile. A cache that cannot be read is removed and
    made anew.
    """
    with _help(product) as begin_to_help:

        def begin() -> None:
            on_compile()
            begin_to_help()

        with event.install_listener("numba:compile", _FirstCompilation(begin)):
            try:
                compile_grouped_products(product)
            except _DAMAGE:
                discard_cache()
                compile_grouped_products(product)
    try:
        _run(product)
    except _DAMAGE:
        discard_cache()
        _run(product)


@contextmanager
def _help(product: Product) -> Iterator[Callable[[], None]]:
    """What is called inside starts a process that puts the other half into the cache; its end is waited for.

    Where that fails, what it left out is compiled here.
    """
    helpers: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        if kept_on_disk() and usable_cores() > 1 and sys.executable:
            what = product.tier.name, product.weights, product.activations
            code = f"from fiddler.kernels.prepare import prepare_other_half as p; p{what}"
            quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
            helpers.append(subprocess.Popen([sys.executable, "-P", "-c", code], **quiet))

    try:
        yield begin
    except BaseException:
        for helper in helpers:
            helper.kill()
        raise
    finally:
        for helper in helpers:
            helper.wait()


def prepare_other_half(tier: str, weights: str, activations: str) -> None:
    """What `prepare` leaves to another process: all but the largest kernel."""
    block_product.address(Product(next(t for t in TIERS if t.name == tier), weights, activations))
    _run_others(activations)


def _run(product: Product) -> None:
    bits = np.zeros((1, 2, 2), np.uint16)
    x = np.zeros((1, 2), np.float32)
    linear(x, bits[0], product)
    expert_ffn(x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), bits, bits, bits, product)
    _run_others(product.activations)


def _run_others(activations: str) -> None:
    """What stands between the products."""
    x = np.zeros((1, 2), np.float32)
    kept = np.zeros((1, 1, 2), np.uint16 if activations == "bf16" else np.float32)
    attend_each(x[None], x[None], x[None], [kept], [kept], [0], x[0, :1])
    route(rms_norm(x, x[0], 1.0), x, 1)

"""Compiling a product's kernels before they are needed, and again where what was kept on disk is damaged."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
from numba.core import event

from fiddler.kernels.attention import attend_each
from fiddler.kernels.codegen.jit import cached_on_disk, discard_cache
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.decode_step import compile_decode
from fiddler.kernels.machine.isa import choose_tier
from fiddler.kernels.machine.threads import usable_cores
from fiddler.kernels.matmul.grouped import addresses, compile_grouped_products
from fiddler.kernels.norm_router import rms_norm, route

__all__ = ["COMPILING", "help_with", "precompile"]

_PATIENCE = 120  # seconds that another process may take longer than this one
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


def precompile(variant: KernelVariant, on_compile: Callable[[], None] = lambda: None, decode: bool = False) -> None:
    """Compile the kernels of `variant` and what stands between the products, or read them from the cache.

    Seconds the first time, then a moment. Another process compiles half of it, where there is a core for that.
    `on_compile` is called, once, where there is something to compile. decode: that of a `CompiledDecodeStep`, too. A cache that
    cannot be read is removed and made anew.
    """
    with event.install_listener("numba:compile", _FirstCompilation(on_compile)):
        try:
            with _helped(variant, decode):
                _one_half(variant)
            _other_half(variant, decode)
        except _DAMAGE:
            discard_cache()
            _one_half(variant)
            _other_half(variant, decode)


def _one_half(variant: KernelVariant) -> None:
    compile_grouped_products(variant)
    x, kept = np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), _kept(variant))
    attend_each(x, x, x, [kept], [kept], [0], x[0, 0, :1])
    route(rms_norm(x[0], x[0, 0], 1.0), x[0], 1)


def _other_half(variant: KernelVariant, decode: bool) -> None:
    addresses(variant)
    if decode:
        compile_decode(variant, _kept(variant))


def _kept(variant: KernelVariant) -> type[np.generic]:
    """Of what type keys and values are beside these products."""
    return np.uint16 if variant.activations == "bf16" else np.float32


@contextmanager
def _helped(variant: KernelVariant, decode: bool) -> Iterator[None]:
    """Where something is compiled inside, another process puts the other half into the cache until the end.

    What it leaves out, for whatever reason, is compiled where it is needed.
    """
    with (
        ExitStack() as helpers,
        event.install_listener(
            "numba:compile", _FirstCompilation(lambda: helpers.enter_context(_helper(variant, decode)))
        ),
    ):
        yield


@contextmanager
def _helper(variant: KernelVariant, decode: bool) -> Iterator[None]:
    """A process that puts the other half into the cache, where there is a core for it; it has ended when this does."""
    process = None
    if cached_on_disk() and usable_cores() > 1 and sys.executable:
        arguments = variant.tier.name, variant.weights, variant.activations, decode
        paths = os.pathsep.join(path for path in sys.path if isinstance(path, str) and path)
        with suppress(OSError):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from fiddler.kernels.precompile import help_with; help_with{arguments}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
    try:
        yield
        if process is not None:
            process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process is not None:
            process.kill()
            process.wait()


def help_with(tier: str, weights: str, activations: str, decode: bool) -> None:
    """What `precompile` of this product leaves to another process."""
    _other_half(KernelVariant(choose_tier(tier), weights, activations), decode)


COMPILING = "compiling kernels for this CPU; the next start finds them on disk"

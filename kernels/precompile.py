"""Compiles a variant's kernels before their first use, and again where the cache on disk is damaged."""

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
from fiddler.kernels.machine.tuning import TUNINGS
from fiddler.kernels.matmul.grouped import addresses, compile_grouped_products
from fiddler.kernels.norm_router import rms_norm, route

__all__ = ["COMPILING", "compile_for_parent", "precompile"]

_HELPER_TIMEOUT = 120  # how much longer the helper process may take than this one [s]
_DAMAGED_CACHE = (
    EOFError,
    pickle.UnpicklingError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    ValueError,
    OSError,
)
"""What Numba raises on a file of its cache that is damaged, or that it may not read or write."""


class _FirstCompilation(event.Listener):
    """Calls back once, when Numba begins its first compilation."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def on_start(self, event: object) -> None:
        """Implements `Listener.on_start`."""
        if self._callback is not None:
            callback, self._callback = self._callback, None
            callback()

    def on_end(self, event: object) -> None:
        """Implements `Listener.on_end`."""


def precompile(variant: KernelVariant, on_compile: Callable[[], None] = lambda: None, decode: bool = False) -> None:
    """Compile the kernels of `variant`, attention, norm and router, or read them from the cache.

    Takes seconds the first time, then a moment. A helper process compiles half of them, where it has a core.
    `on_compile` is called once if anything must be compiled. decode: also compile `CompiledDecodeStep.step`. A damaged
    cache is removed and built again, or left alone where it cannot be removed.
    """
    with event.install_listener("numba:compile", _FirstCompilation(on_compile)):
        try:
            with _with_helper(variant, decode):
                _compile_first_half(variant)
            _compile_second_half(variant, decode)
        except _DAMAGED_CACHE:
            discard_cache()
            _compile_first_half(variant)
            _compile_second_half(variant, decode)


def _compile_first_half(variant: KernelVariant) -> None:
    compile_grouped_products(variant)
    x, kv = np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), _kv_dtype(variant))
    attend_each(x, x, x, [kv], [kv], [0], x[0, 0, :1])
    route(rms_norm(x[0], x[0, 0], 1.0), x[0], 1)


def _compile_second_half(variant: KernelVariant, decode: bool) -> None:
    addresses(variant)
    if decode:
        compile_decode(variant, _kv_dtype(variant))


def _kv_dtype(variant: KernelVariant) -> type[np.generic]:
    """The KV cache's type beside this variant."""
    return np.uint16 if variant.activations == "bf16" else np.float32


@contextmanager
def _with_helper(variant: KernelVariant, decode: bool) -> Iterator[None]:
    """Start a helper process at the first compilation inside the context; it compiles the second half into the cache.

    This process compiles whatever the helper did not, for any reason.
    """
    with (
        ExitStack() as helpers,
        event.install_listener(
            "numba:compile", _FirstCompilation(lambda: helpers.enter_context(_helper_process(variant, decode)))
        ),
    ):
        yield


@contextmanager
def _helper_process(variant: KernelVariant, decode: bool) -> Iterator[None]:
    """Compile the second half in another process, where a core is free; it has ended when the context ends."""
    process = None
    if cached_on_disk() and usable_cores() > 1 and sys.executable:
        arguments = variant.tier.name, variant.weights, variant.activations, variant.tuning.name, decode
        paths = os.pathsep.join(path for path in sys.path if isinstance(path, str) and path)
        with suppress(OSError):
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from fiddler.kernels.precompile import compile_for_parent; compile_for_parent{arguments}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
    try:
        yield
        if process is not None:
            process.wait(_HELPER_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process is not None:
            process.kill()
            process.wait()


def compile_for_parent(tier: str, weights: str, activations: str, tuning: str, decode: bool) -> None:
    """The helper process's half of `precompile`, for this variant."""
    _compile_second_half(KernelVariant(choose_tier(tier), weights, activations, TUNINGS[tuning]), decode)


COMPILING = "compiling kernels for this CPU; the next start finds them on disk"

"""Compiles kernels with Numba and caches them on disk. Knows nothing of their computation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from numba import config, njit

from fiddler.errors import RequestError
from fiddler.kernels.codegen.kernel_cache import KernelCache
from fiddler.kernels.codegen.kernel_library import KernelCompiler

__all__ = ["FASTMATH", "OPTIONS", "cached_on_disk", "kernel"]

FASTMATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; NaN and infinities keep their meaning (no `nnan`, no `ninf`)."""

OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "no_cfunc_wrapper": True}
"""Numba options of all compiled code: no checks and no C entry point, because these cost compile time.

A division by 0 raises nothing: floats give infinities or NaN, integers 0.
"""

_kernels: list[Any] = []


def kernel(function: Callable[..., Any] | None = None, parallel: bool = True, fastmath: bool = True) -> Any:
    """Compile a function with parallel loops on its first call, without the GIL and without bounds checks.

    parallel=False makes its loops serial, which compile in a fraction of the time. fastmath=False keeps the order of
    float32 sums and rounds each product.

    Machine code is cached beside the source, or in the user's cache directory where the source's folder is read-only;
    where both are, every process compiles again.
    Raises RequestError where Numba's compiler is switched off.
    """
    if function is None:
        return partial(kernel, parallel=parallel, fastmath=fastmath)
    if config.DISABLE_JIT:
        raise RequestError("Numba compiles nothing: unset NUMBA_DISABLE_JIT, or disable_jit in .numba_config.yaml")
    flags = FASTMATH if fastmath else False
    compiled = njit(**OPTIONS, parallel=parallel, fastmath=flags, pipeline_class=KernelCompiler)(function)
    with suppress(RuntimeError):  # no folder for the cache
        compiled._cache = KernelCache(function)  # Numba has no public way to choose a cache
    _kernels.append(compiled)
    return compiled


def cached_on_disk() -> bool:
    """Whether machine code is cached for other processes."""
    return all(compiled.stats.cache_path is not None for compiled in _kernels)

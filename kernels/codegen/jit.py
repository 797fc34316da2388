"""Compiles kernels with Numba and caches them on disk. Knows nothing of their computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import NullCache

__all__ = ["FASTMATH", "OPTIONS", "cached_on_disk", "discard_cache", "kernel"]

FASTMATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; NaN and infinities keep their meaning (no `nnan`, no `ninf`)."""

OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "no_cfunc_wrapper": True}
"""Numba options of all compiled code: no checks and no C entry point, because these cost compile time.

A division by 0 raises nothing: floats give infinities or NaN, integers 0.
"""

_kernels: list[Any] = []


def kernel(function: Callable[..., Any], parallel: bool = True) -> Any:
    """Compile a function with parallel loops on its first call, without the GIL and without bounds checks.

    parallel=False makes its loops serial, which compile in a fraction of the time.

    Machine code is cached beside the source, or in the user's cache directory where the source's folder is read-only;
    where both are, every process compiles again.
    """
    options = OPTIONS | {"parallel": parallel, "fastmath": FASTMATH}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache
        compiled = njit(**options)(function)
    _kernels.append(compiled)
    return compiled


def cached_on_disk() -> bool:
    """Whether machine code is cached for other processes."""
    return all(compiled.stats.cache_path is not None for compiled in _kernels)


def discard_cache() -> None:
    """Remove the cached machine code of all kernels; a file that is gone already is no error.

    A kernel whose files cannot be removed, as in a read-only folder, is compiled without a cache from now on.
    """
    for compiled in _kernels:
        if compiled.stats.cache_path is None:
            continue
        source = Path(compiled.py_func.__code__.co_filename).stem
        try:
            for path in Path(compiled.stats.cache_path).glob(f"{source}.{compiled.py_func.__name__}-*.nb[ic]"):
                path.unlink(missing_ok=True)
        except OSError:
            compiled._cache = NullCache()  # Numba has no public way to switch a cache off

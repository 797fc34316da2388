"""How kernels are compiled and kept on disk. Knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

__all__ = ["FASTMATH", "OPTIONS", "cached_on_disk", "discard_cache", "kernel"]

FASTMATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and fused; NaN and infinities keep their meaning (no `nnan`, no `ninf`)."""

OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "no_cfunc_wrapper": True}
"""Of all compiled code: no checks and no entry for C, which cost time to compile.

A division by 0 raises nothing: floats give infinities or NaN, integers 0.
"""

_kernels: list[Any] = []


def kernel(function: Callable[..., Any], parallel: bool = True) -> Any:
    """Compile a function with parallel loops when it is first called, without the GIL and without bounds checks.

    Without `parallel` its loops are ordinary ones, which compile in a fraction of the time.

    Machine code is kept beside the source, or in the user's cache directory where that cannot be written; where
    neither can, every process compiles anew.
    """
    options = OPTIONS | {"parallel": parallel, "fastmath": FASTMATH}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no place to keep it
        compiled = njit(**options)(function)
    _kernels.append(compiled)
    return compiled


def cached_on_disk() -> bool:
    """Whether machine code is kept for other processes."""
    return all(compiled.stats.cache_path is not None for compiled in _kernels)


def discard_cache() -> None:
    """Remove the kept code of all kernels, where there is any; files that cannot be removed are left."""
    for compiled in _kernels:
        if compiled.stats.cache_path is None:
            continue
        source = Path(compiled.py_func.__code__.co_filename).stem
        for path in Path(compiled.stats.cache_path).glob(f"{source}.{compiled.py_func.__name__}-*.nb[ic]"):
            path.unlink(missing_ok=True)

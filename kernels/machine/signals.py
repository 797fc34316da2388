"""Numbers in memory by which compiled code waits for other threads and for devices. Knows nothing of their meaning."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["SIGNAL_STRIDE", "TRIES", "is_at", "pause", "set_signal", "signal", "wait_for"]

SIGNAL_STRIDE = 16
"""uint32s from one signal to the next: each has a cache line of its own."""

_X86 = platform.machine() in ("x86_64", "AMD64")
TRIES = 1 << (13 if _X86 else 18)
"""Turns of a loop that waits awake with `pause`, some 0.2 to 0.5 ms: it takes 20 to 50 ns, less before Skylake."""
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "no_cfunc_wrapper": True}


@intrinsic
def _load(_context: Any, _address: Any) -> Any:
    """The uint32 at an address, as int64; what was written before it is seen after it."""
    word, number = ir.IntType(64), ir.IntType(32)

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        pointer = b.inttoptr(arguments[0], number.as_pointer())
        return b.zext(b.load_atomic(pointer, "acquire", 4), word)

    return types.int64(types.int64), generate


@intrinsic
def _store(_context: Any, _address: Any, _value: Any) -> Any:
    """Write the low 32 bits of an int64 to an address, after all that was written before."""
    number = ir.IntType(32)

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        pointer = b.inttoptr(arguments[0], number.as_pointer())
        b.store_atomic(b.trunc(arguments[1], number), pointer, "release", 4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def pause(_context: Any) -> Any:
    """Leave the core to its other hardware thread for a moment, which a loop that waits would slow down."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, _arguments: list[ir.Value]) -> ir.Value:
        if _X86:
            name = "llvm.x86.sse2.pause"
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.none(), generate


@njit(**_OPTIONS)
def signal(signals: np.ndarray, index: int) -> int:
    """The number of a signal. signals: uint32 [N * SIGNAL_STRIDE]."""
    number: int = _load(signals.ctypes.data + 4 * SIGNAL_STRIDE * index)
    return number


@njit(**_OPTIONS)
def set_signal(signals: np.ndarray, index: int, number: int) -> None:
    """Set a signal to the low 32 bits of `number`."""
    _store(signals.ctypes.data + 4 * SIGNAL_STRIDE * index, number)


@njit(**_OPTIONS)
def is_at(signals: np.ndarray, index: int, number: int) -> bool:
    """Whether a signal is `number` or later, modulo 2**32."""
    return bool((signal(signals, index) - number) & 0xFFFFFFFF < 1 << 31)


@njit(**_OPTIONS)
def wait_for(signals: np.ndarray, index: int, number: int) -> bool:
    """Wait awake until a signal is `number` or later; False if it is not after some 0.5 ms."""
    for _ in range(TRIES):
        if is_at(signals, index, number):
            return True
        pause()
    return False

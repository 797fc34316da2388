"""The time, for compiled code. Knows nothing of what it measures."""

from __future__ import annotations

from time import CLOCK_MONOTONIC
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["now"]


@intrinsic
def now(_context: Any) -> Any:
    """CLOCK_MONOTONIC [s], as time.perf_counter has it on Linux."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, _arguments: list[ir.Value]) -> ir.Value:
        word = ir.IntType(64)
        function_type = ir.FunctionType(ir.IntType(32), [ir.IntType(32), word.as_pointer()])
        clock_gettime = cgutils.get_or_insert_function(b.module, function_type, "clock_gettime")
        time = cgutils.alloca_once(b, word, 2)
        b.call(clock_gettime, [ir.Constant(ir.IntType(32), CLOCK_MONOTONIC), time])
        seconds, nanoseconds = (
            b.sitofp(b.load(b.gep(time, [ir.Constant(ir.IntType(32), i)])), ir.DoubleType()) for i in range(2)
        )
        return b.fadd(seconds, b.fmul(nanoseconds, ir.Constant(ir.DoubleType(), 1e-9)))

    return types.float64(), generate

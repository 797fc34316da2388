"""Kernels that other kernels call through their address. Knows nothing of what they compute.

A kernel called by its name is compiled once more with each of its callers, and again with each of the functions that
Numba makes of a caller's parallel loop. One that is called through its address is compiled once, by itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["FunctionPointer"]


class FunctionPointer:
    """What a kernel is called through."""

    def __init__(self, kernel: Any, *arguments: types.Type | None, returns: types.Type = types.none) -> None:
        """`arguments`: their types; None for one of several, for each of which the kernel is compiled."""
        self._kernel, self._arguments, self._returns = kernel, arguments, returns

    def address(self, *kinds: types.Type) -> int:
        """Where the code lies in this process, of these types in place of None; compiled or read from the cache."""
        given = iter(kinds)
        signature = self._returns(*(next(given) if type is None else type for type in self._arguments))
        made = self._kernel.get_compile_result(signature)
        return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))

    @cached_property
    def call(self) -> Any:
        """For compiled code: call(address, (argument, ...))."""
        arguments, returns = self._arguments, self._returns

        @intrinsic
        def call(_context: Any, place: Any, values: Any) -> Any:
            given = list(values.types)
            expected = [here if type is None else type for here, type in zip(given, arguments, strict=True)]

            def generate(context: Any, b: ir.IRBuilder, _signature: Any, values: list[ir.Value]) -> ir.Value:
                place, packed = values
                unpacked = (b.extract_value(packed, i) for i in range(len(given)))
                cast = [context.cast(b, *each) for each in zip(unpacked, given, expected, strict=True)]
                function = context.call_conv.get_function_type(returns, expected)
                callee = b.inttoptr(place, function.as_pointer())
                status, value = context.call_conv.call_function(b, callee, returns, expected, cast)
                with b.if_then(status.is_error, likely=False):
                    context.call_conv.return_status_propagate(b, status)
                return context.get_dummy_value() if returns == types.none else value

            return returns(types.intp, values), generate

        return call

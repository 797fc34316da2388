"""Kernels that other kernels call through a function pointer. Knows nothing of their computation.

Numba compiles a kernel that is called by name again with each caller, and again with each of the functions that it
makes of a caller's parallel loop. A kernel that is called through its address is compiled once, by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["FunctionPointer"]


class FunctionPointer:
    """A kernel that compiled code calls through its address."""

    def __init__(self, kernel: Any, *arguments: types.Type | None, returns: types.Type = types.none) -> None:
        """`arguments`: the argument types; None leaves one open: the kernel is compiled for each type in use."""
        self._kernel, self._arguments, self._returns = kernel, arguments, returns

    def address(self, *kinds: types.Type) -> int:
        """The code's address in this process, with `kinds` for the open types; compiled, or read from the cache."""
        compiled = self._compiled(kinds)
        return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))

    def entry(self, *kinds: types.Type) -> Callable[..., Any]:
        """The code as a function of Python that looks up no types: an argument of another type is not noticed.

        With cold caches that saves most of a call's 130 us.
        """
        entry_point: Callable[..., Any] = self._compiled(kinds).entry_point
        return entry_point

    def _compiled(self, kinds: tuple[types.Type, ...]) -> Any:
        open_types = iter(kinds)
        signature = self._returns(*(next(open_types) if type is None else type for type in self._arguments))
        return self._kernel.get_compile_result(signature)

    @cached_property
    def call(self) -> Any:
        """For compiled code: call(address, (argument, ...))."""
        arguments, returns = self._arguments, self._returns

        @intrinsic
        def call(_context: Any, function_address: Any, values: Any) -> Any:
            value_types = list(values.types)
            expected = [
                value_type if type is None else type for value_type, type in zip(value_types, arguments, strict=True)
            ]

            def generate(context: Any, b: ir.IRBuilder, _signature: Any, values: list[ir.Value]) -> ir.Value:
                function_address, packed = values
                unpacked = (b.extract_value(packed, i) for i in range(len(value_types)))
                cast = [context.cast(b, *each) for each in zip(unpacked, value_types, expected, strict=True)]
                function = context.call_conv.get_function_type(returns, expected)
                callee = b.inttoptr(function_address, function.as_pointer())
                status, value = context.call_conv.call_function(b, callee, returns, expected, cast)
                with b.if_then(status.is_error, likely=False):
                    context.call_conv.return_status_propagate(b, status)
                return context.get_dummy_value() if returns == types.none else value

            return returns(types.intp, values), generate

        return call

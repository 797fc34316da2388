"""Kernels that other kernels call through their address. Knows nothing of what they compute.

A kernel called by its name is compiled once more with each of its callers, and again with each of the functions that
Numba makes of their parallel loops. One that is called through its address is compiled once, by itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from llvmlite import ir
from numba import typeof, types
from numba.extending import intrinsic

from fiddler.kernels.product import Product

__all__ = ["Called"]


class Called:
    """What a `Product`'s kernel that returns nothing is called through; its first argument is the product."""

    def __init__(self, kernel: Any, *arguments: types.Type) -> None:
        """`arguments`: the types of the others."""
        self._kernel, self._arguments = kernel, arguments
        self._addresses: dict[Product, int] = {}

    def address(self, product: Product) -> int:
        """Where its code lies in this process; it is compiled, or read from the cache, the first time."""
        if product not in self._addresses:
            made = self._kernel.get_compile_result(types.void(typeof(product), *self._arguments))
            self._addresses[product] = int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))
        return self._addresses[product]

    @cached_property
    def call(self) -> Any:
        """For compiled code: call(address, (product, ...)) calls it."""
        others = self._arguments

        @intrinsic
        def call(_context: Any, place: Any, arguments: Any) -> Any:
            given = list(arguments.types)
            expected = [given[0], *others]
            if len(given) != len(expected):
                return None

            def generate(context: Any, b: ir.IRBuilder, _signature: Any, values: list[ir.Value]) -> ir.Value:
                unpacked = (b.extract_value(values[1], i) for i in range(len(given)))
                cast = [context.cast(b, *each) for each in zip(unpacked, given, expected, strict=True)]
                function = context.call_conv.get_function_type(types.none, expected)
                callee = b.inttoptr(values[0], function.as_pointer())
                status, _ = context.call_conv.call_function(b, callee, types.none, expected, cast)
                with b.if_then(status.is_error, likely=False):
                    context.call_conv.return_status_propagate(b, status)
                return context.get_dummy_value()

            return types.void(types.intp, arguments), generate

        return call

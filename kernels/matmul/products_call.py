"""Calls of `grouped_products` from Python whose types are looked up once. Knows no weights.

A call looks up its arguments' types in 3 us; in 65, where the products before have evicted Numba's code and tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import typeof

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.machine.threads import is_parallel, one_caller, thread_count, threads_for
from fiddler.kernels.matmul.grouped import addresses, products, workspace

__all__ = ["BoundProducts", "ProductsCall"]


class _Compiled(NamedTuple):
    """The kernels of a variant."""

    entry: Callable[..., int]
    address: int  # of `grouped_products`
    addresses: tuple[int, int]  # of the kernels that it calls


class BoundProducts:
    """`grouped_products` with arrays that may be filled anew before each call."""

    def __init__(
        self, variant: KernelVariant, compiled: _Compiled, arguments: tuple[Any, ...], multiplications: int
    ) -> None:
        """See `ProductsCall`."""
        self.variant, self.arguments = variant, arguments
        self._entry, self.address, self.addresses = compiled
        self.parallel = is_parallel(multiplications)
        """Whether a call is worth all threads."""
        self._multiplications = multiplications

    def __call__(self) -> bool:
        """Compute; False if an expert id is out of range."""
        entry, arguments, threads = self._entry, self.arguments, thread_count()
        if self.parallel or threads == 1:
            with one_caller():
                needed_words = entry(self.variant, *arguments, workspace.words, threads, self.addresses)
            if needed_words <= 0:
                return needed_words == 0
        with threads_for(self._multiplications) as threads:
            needed_words = entry(self.variant, *arguments, workspace.words, threads, self.addresses)
            if needed_words > 0:
                memory = workspace.grow(needed_words)
                needed_words = entry(self.variant, *arguments, memory, threads, self.addresses)
        assert needed_words <= 0
        return needed_words == 0


class ProductsCall:
    """`grouped_products` of one variant. Its caller has checked the arrays: another type is not noticed."""

    def __init__(self, variant: KernelVariant) -> None:
        """variant: a `KernelVariant.grouping`. Compiles nothing: the first call does."""
        self._variant = variant
        self._compiled: _Compiled | None = None

    def __call__(self, arguments: tuple[Any, ...], multiplications: int) -> bool:
        """Compute on the threads that `multiplications` justify; False if an expert id is out of range.

        arguments: those of `grouped_products` from `x` to `biases`.
        """
        return self.bind(arguments, multiplications)()

    def bind(self, arguments: tuple[Any, ...], multiplications: int) -> BoundProducts:
        """A call with these arguments, whose arrays may be filled anew before it."""
        compiled = self._compiled or self._compile()
        return BoundProducts(self._variant, compiled, arguments, multiplications)

    def _compile(self) -> _Compiled:
        thread_count()  # starts the threading layer: loading a parallel kernel fails without one
        kind, tail = typeof(self._variant), addresses(self._variant)
        self._compiled = _Compiled(products.entry(kind), products.address(kind), tail)
        return self._compiled

"""Calls of `grouped_products` from Python whose types are looked up once. Knows no weights.

A call looks up its arguments' types in 3 us; in 65, where the products before have evicted Numba's code and tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import typeof

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.machine.threads import is_parallel, one_caller, thread_count, threads_for
from fiddler.kernels.matmul.grouped import addresses, products, workspace

__all__ = ["ProductsCall"]


class ProductsCall:
    """`grouped_products` of one variant. Its caller has checked the arrays: another type is not noticed."""

    def __init__(self, variant: KernelVariant) -> None:
        """variant: a `KernelVariant.grouping`. Compiles nothing: the first call does."""
        self._variant = variant
        self._entry: Callable[..., int] | None = None
        self._addresses = 0, 0

    def __call__(self, arguments: tuple[Any, ...], multiplications: int) -> bool:
        """Compute on the threads that `multiplications` justify; False if an expert id is out of range.

        arguments: those of `grouped_products` from `x` to `biases`.
        """
        return self.bind(arguments, multiplications)()

    def bind(self, arguments: tuple[Any, ...], multiplications: int) -> Callable[[], bool]:
        """A function that computes with these arguments, whose arrays may be filled anew before each call."""
        entry, tail, lock = self._entry or self._compiled(), self._addresses, one_caller()
        head = self._variant, *arguments
        parallel = is_parallel(multiplications)

        def compute() -> bool:
            threads = thread_count()
            if parallel or threads == 1:
                with lock:
                    needed_words = entry(*head, workspace.words, threads, tail)
                if needed_words <= 0:
                    return needed_words == 0
            with threads_for(multiplications) as threads:
                needed_words = entry(*head, workspace.words, threads, tail)
                if needed_words > 0:
                    needed_words = entry(*head, workspace.grow(needed_words), threads, tail)
            assert needed_words <= 0
            return needed_words == 0

        return compute

    def _compiled(self) -> Callable[..., int]:
        thread_count()  # starts the threading layer: loading a parallel kernel fails without one
        self._addresses = addresses(self._variant)
        self._entry = products.entry(typeof(self._variant))
        return self._entry

"""Machine code of a kernel that calls only its own functions. Knows Numba's interface to LLVM; nothing of kernels.

Numba optimises each function that a kernel calls by itself, and its copy within the kernel again: the two may add in
another order. Both have one weak name, and the loader of machine code takes the first that it meets. That is the former
in a process that compiles, and the latter in one that reads the kernel from disk. Names of a kernel's own leave no
choice: it runs the same code in both.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

__all__ = ["KernelCompiler"]

_SHARED = ("linkonce_odr", "weak_odr")
"""Linkage of the functions that Numba links into a module: those that are called, and the bodies of parallel loops."""


class _KernelLibrary(JITCodeLibrary):
    """A module whose linked functions become internal once it has been optimised."""

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage.name in _SHARED:
                function.linkage = "internal"
        super()._finalize_final_module()


class KernelCompiler(Compiler):
    """Numba's compiler, for the `pipeline_class` of a kernel: its result does not depend on what else was compiled."""

    def define_pipelines(self) -> Any:
        """Numba's pipelines, which write into a library of ours."""
        library = _KernelLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        library.enable_object_caching()
        self.state.library = library
        return super().define_pipelines()

"""One matrix of each expert of a layer, wherever each of them lies. Knows arrays and addresses; not what they hold.

Files stack a layer's experts in one tensor; those from before April 2024 have a tensor an expert. Kernels and copies
take an address an expert, so that either is read in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.formats import format_of
from fiddler.kernels.machine.workspace import address_of

__all__ = ["ExpertMatrices", "check_experts"]


@dataclass(frozen=True, eq=False)
class ExpertMatrices:
    """A matrix [rows, columns] of each of E experts; `matrices[e]` is expert e's, a view."""

    memory: np.ndarray | tuple[np.ndarray, ...]
    """[E, rows, columns], or E arrays [rows, columns]; kept, since the addresses are of nobody's otherwise."""
    addresses: np.ndarray
    """int64 [E]"""
    shape: tuple[int, int, int]
    """E, rows, columns"""
    dtype: np.dtype

    @classmethod
    def of(cls, memory: np.ndarray | Sequence[np.ndarray]) -> ExpertMatrices:
        """Of a stack [E, rows, columns] or of E arrays [rows, columns]; read-only mappings will do.

        Raises ValueError where they are not contiguous, or not of one shape and type.
        """
        if isinstance(memory, np.ndarray):
            if memory.ndim != 3 or not memory.flags.c_contiguous:
                raise ValueError(f"experts are {memory.dtype} {memory.shape}; expected contiguous [E, rows, columns]")
            addresses = address_of(memory) + memory.strides[0] * np.arange(len(memory))
            return cls(memory, addresses, memory.shape, memory.dtype)
        first = memory[0] if memory else None
        for expert, matrix in enumerate(memory):
            assert first is not None
            if matrix.ndim != 2 or matrix.shape != first.shape or matrix.dtype != first.dtype:
                raise ValueError(
                    f"expert {expert} is {matrix.dtype} {matrix.shape}, expert 0 {first.dtype} {first.shape}"
                )
            if not matrix.flags.c_contiguous:
                raise ValueError(f"expert {expert} is not contiguous")
        if first is None:
            raise ValueError("no experts")
        addresses = np.array([address_of(matrix) for matrix in memory], np.int64)
        return cls(tuple(memory), addresses, (len(memory), *first.shape), first.dtype)

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's matrix [bytes]."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> np.ndarray:
        return self.memory[expert]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.memory)


def check_experts(name: str, matrices: object, shape: tuple[int, int, int], variant: KernelVariant) -> None:
    """Raise ValueError unless `matrices` are `ExpertMatrices` of weights of this shape in the variant's format."""
    kind = format_of(variant)
    expected = kind.stored_shape(shape)
    if isinstance(matrices, ExpertMatrices) and (matrices.shape, matrices.dtype) == (expected, kind.dtype):
        return
    there = f"{matrices.dtype} {matrices.shape}" if isinstance(matrices, ExpertMatrices) else "missing"
    raise ValueError(f"{name} is {there}; expected {kind.name} weights {shape}: {kind.dtype.name} {expected}")

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

__all__ = ["ExpertMatrices", "bias_addresses", "check_experts", "check_stored"]


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
    bias: np.ndarray | None = None
    """float32 [E, rows], added to the products"""

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


def check_stored(name: str, stored: np.ndarray, shape: tuple[int, ...], variant: KernelVariant) -> None:
    """Raise ValueError unless `stored` holds weights of this shape in the variant's format, contiguously."""
    kind = format_of(variant)
    if not isinstance(stored, np.ndarray):
        raise ValueError(f"{name} is {stored!r}; expected {kind.name} weights {shape}")
    if stored.dtype != kind.dtype or not stored.flags.c_contiguous or stored.shape != kind.stored_shape(shape):
        raise ValueError(
            f"{name} is {stored.dtype} {stored.shape}; expected {kind.name} weights {shape}: contiguous "
            f"{kind.dtype.name} {kind.stored_shape(shape)}"
        )


def check_experts(name: str, matrices: object, shape: tuple[int, int, int], variant: KernelVariant) -> None:
    """Raise ValueError unless `matrices` are `ExpertMatrices` of weights of this shape in the variant's format."""
    kind = format_of(variant)
    expected = kind.stored_shape(shape)
    if isinstance(matrices, ExpertMatrices) and (matrices.shape, matrices.dtype) == (expected, kind.dtype):
        bias = matrices.bias
        if bias is None or (bias.shape == shape[:2] and bias.dtype == np.float32 and bias.flags.c_contiguous):
            return
        raise ValueError(f"the bias of {name} is {bias.dtype} {bias.shape}; expected contiguous float32 {shape[:2]}")
    there = f"{matrices.dtype} {matrices.shape}" if isinstance(matrices, ExpertMatrices) else "missing"
    raise ValueError(f"{name} is {there}; expected {kind.name} weights {shape}: {kind.dtype.name} {expected}")


def bias_addresses(matrices: Sequence[ExpertMatrices]) -> np.ndarray:
    """The address of each expert's bias of each matrix, int64 [matrices, E]; without columns where there are none.

    Raises ValueError where only some have biases.
    """
    biases = [each.bias for each in matrices if each.bias is not None]
    if not biases:
        return np.empty((len(matrices), 0), np.int64)
    if len(biases) < len(matrices):
        raise ValueError("some matrices of the experts have biases, others have none")
    return np.array([address_of(bias) + bias.strides[0] * np.arange(len(bias)) for bias in biases])

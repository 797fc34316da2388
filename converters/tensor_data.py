"""The data of one tensor of the file that is written: rows of its matrices in its type, piece after piece.

Knows types, the order of rows and where importances belong; not where rows come from or go to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import gguf
import numpy as np
from numpy.typing import NDArray

from fiddler.converters.checkpoint import Source
from fiddler.converters.dtypes import RangeLoss, to_bits, to_float32
from fiddler.converters.gguf_source import GgufMatrix
from fiddler.converters.mxfp4 import PackedMatrix
from fiddler.converters.row_order import interleave
from fiddler.converters.safetensors_file import Array
from fiddler.converters.tensor_lookup import Transposed

if TYPE_CHECKING:
    from fiddler.converters.quantisation import Quantiser

__all__ = ["TargetTensor", "pieces"]

_PIECE = 1 << 17  # elements converted at once: all temporaries, some MB, fit a cache (3x faster than 1 << 20)


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the GGUF: its name, shape, type and order of rows."""

    name: str
    shape: tuple[int, ...]
    kind: str  # as `kernels.formats` names them: "f32", "bf16", "q4_k" and so on
    heads: int  # whose rows are interleaved for RoPE; 0: the order of rows stays

    @property
    def quantised(self) -> bool:
        """Whether weights share scales."""
        return self.kind not in ("f32", "f16", "bf16")

    def of_rows(self, values: NDArray[np.float32], first: int, start: int, stop: int) -> NDArray[np.float32]:
        """Of values [E, K], one row for each matrix of the tensor, those of its rows first + start to first + stop."""
        matrices: NDArray[np.intp] = np.arange(first + start, first + stop) // self.shape[-2]
        rows: NDArray[np.float32] = values[matrices]
        return rows

    @property
    def nbytes(self) -> int:
        length, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // length * nbytes

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        """GGUF's type of the tensor."""
        return gguf.GGMLQuantizationType[self.kind.upper()]


def pieces(
    matrix: Source | GgufMatrix,
    tensor: TargetTensor,
    quantiser: Quantiser | None,
    importance: Callable[[int, int], NDArray[np.float32]] | None,
) -> Iterator[tuple[Array, RangeLoss]]:
    """The rows of `matrix` as contiguous arrays of `tensor`'s type, in GGUF's order, and each array's loss.

    importance: returns that of the weights of rows of `matrix`, from one to before another.
    """
    group = 1 if not tensor.heads else matrix.count // tensor.heads  # rows that must stay in one piece
    step = max(1, _PIECE // (matrix.width * group)) * group
    read = _reader(matrix)

    def rows_from(start: int) -> Array:
        rows = read(start, min(start + step, matrix.count))
        return interleave(rows, group) if tensor.heads else rows

    def rows_and_importance(start: int) -> tuple[Array, NDArray[np.float32] | None]:
        rows = rows_from(start)
        return rows, None if importance is None else importance(start, start + len(rows))

    starts = range(0, matrix.count, step)
    if tensor.kind == "mxfp4" and isinstance(matrix, PackedMatrix):
        for start in starts:
            yield matrix.blocks(start, min(start + step, matrix.count)), RangeLoss()
        return
    if tensor.quantised:
        assert quantiser is not None
        yield from quantiser.encoded((partial(rows_and_importance, start) for start in starts), tensor.kind)
        return
    for start in starts:
        rows = rows_from(start)
        if tensor.kind == "f32":
            wide = np.ascontiguousarray(to_float32(rows))
            yield wide, RangeLoss(nans=int(np.count_nonzero(np.isnan(wide))))
        else:
            bits, loss = to_bits(rows, "f16" if tensor.kind == "f16" else "bf16")
            yield np.ascontiguousarray(bits), loss


def _reader(matrix: Source | GgufMatrix) -> Callable[[int, int], Array]:
    """Reads rows of a matrix: of a transposed one from memory, where it lies whole."""
    if not isinstance(matrix, Transposed):
        return matrix.rows
    whole = matrix.rows(0, matrix.count)
    return lambda start, stop: whole[start:stop].copy()  # a view would keep the matrix alive

"""Matrices that a checkpoint stores as blocks of MXFP4: gpt-oss's experts. Knows both layouts of a block.

A checkpoint has codes and scales in two tensors (OCP Microscaling Formats specification 1.0; transformers'
`integrations/mxfp4.py`): of a block's 32 numbers, neighbours share a byte, the first in its low half. GGUF has the
scale before the codes of its block, and i and i + 16 in one byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np

from fiddler.converters.safetensors_file import Array, StoredTensor
from fiddler.converters.weight_files import WeightFile

__all__ = ["BLOCK", "PackedMatrix"]

BLOCK = 32
"""Numbers of a block."""


@dataclass(frozen=True)
class PackedMatrix:
    """`count` rows of a stored matrix, every `step`-th from row `first` on.

    codes: [..., rows, blocks, 16]; scales: [..., rows, blocks], of the rows of all experts one after the other.
    """

    file: WeightFile
    codes: StoredTensor
    scale_file: WeightFile
    scales: StoredTensor
    first: int
    count: int
    step: int
    stored: None = None  # of no type that is converted to another

    @property
    def width(self) -> int:
        return self.scales.shape[-1] * BLOCK

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` as float32, exactly: [stop - start, width], read from the files."""
        values: Array = gguf.dequantize(self.blocks(start, stop), gguf.GGMLQuantizationType.MXFP4)
        return values

    def blocks(self, start: int, stop: int) -> Array:
        """The same rows as GGUF's blocks: uint8 [stop - start, 17 * blocks]."""
        blocks, first = self.scales.shape[-1], self.first + self.step * start
        read = self.step * (stop - start - 1) + 1
        codes = self.file.rows(self.codes, first * blocks, read * blocks).reshape(read, blocks, BLOCK // 2)
        codes = codes[:: self.step]
        numbers = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], 2, BLOCK // 2)
        out = np.empty((stop - start, blocks, 1 + BLOCK // 2), np.uint8)
        out[..., 0] = self.scale_file.rows(self.scales, first, read)[:: self.step]
        out[..., 1:] = numbers[:, :, 0] | numbers[:, :, 1] << 4
        return out.reshape(stop - start, -1)

"""Formats whose weights lie in blocks with scales, as values: GGUF's quantised types. Knows LLVM IR; no type by name.

Every such type is one formula: weight = scale * (code - offset) - minimum, with unsigned codes of at most 8 bits, a
scale (and a minimum) for each 16 or 32 neighbours, and an offset of the type. A type's file says where in a block they
lie; this file makes of them float32 values, equal in every bit to those of the `gguf` package, and codes for integer
dot products. (Layouts: ggml's `ggml-common.h`, and `gguf/quants.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.llvm import F16, F32, I8, I16, I32, I64, address, load, splat
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.formats.half import F16 as HALF
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["GROUP", "Block", "BlockFormat", "Scales", "exact_product", "nibbles", "picked"]

GROUP = 32
"""Weights that are decoded together; with int8 activations, one instruction multiplies a group, or two. Every block is
whole groups."""

_STRICT = ("arcp",)  # a flag without effect on products and sums: Numba's fast-math spares instructions with flags


def exact_product(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """left * right of float32 vectors, neither fused nor reordered in code that allows both."""
    return b.fmul(left, right, flags=_STRICT)


def picked(b: ir.IRBuilder, vector: ir.Value, index: Sequence[int]) -> ir.Value:
    """A vector of these lanes of another."""
    return b.shuffle_vector(
        vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(ir.VectorType(I32, len(index)), list(index))
    )


@dataclass(frozen=True)
class Block:
    """A block at an address (i64), which code is generated to read."""

    b: ir.IRBuilder
    variant: KernelVariant
    base: ir.Value

    def vector(self, offset: int, count: int, element: ir.Type = I8) -> ir.Value:
        """`count` integers from this offset [bytes] on."""
        return load(self.b, self._at(offset), ir.VectorType(element, count), 1)

    def twice(self, offset: int) -> ir.Value:
        """The 32 bytes from this offset on, two times."""
        return picked(self.b, self.vector(offset, 32), [*range(32)] * 2)

    def shifted(self, bytes_: ir.Value, left: Sequence[int]) -> ir.Value:
        """64 bytes as 16-bit words, those of each half shifted left by so many bits, or right where that is negative.

        Bits of neighbours come in: to be masked.
        """
        b, words = self.b, ir.VectorType(I16, 32)
        result = b.bitcast(bytes_, words)
        if any(left):
            assert max(left) <= 0 or min(left) >= 0, "one direction for both"
            amounts = ir.Constant(words, [abs(left[0])] * 16 + [abs(left[1])] * 16)
            result = (b.shl if max(left) > 0 else b.lshr)(result, amounts)
        return b.bitcast(result, bytes_.type)

    def integer(self, offset: int, kind: ir.Type) -> ir.Value:
        """An integer at this offset [bytes]."""
        return load(self.b, self._at(offset), kind, 1)

    def half(self, offset: int) -> ir.Value:
        """The float16 at this offset [bytes], as float32."""
        if self.variant.tier.half_convert:
            return self.b.fpext(load(self.b, self._at(offset), F16, 1), F32)
        return HALF.decode_one(self.b, self.variant, self.integer(offset, I16))

    def splat(self, value: ir.Value, count: int) -> ir.Value:
        """A vector with this value in every lane."""
        return splat(self.b, value, count)

    def constant(self, value: int | Sequence[int], like: ir.Value) -> ir.Constant:
        """An integer, or one a lane, as a vector of the type of `like`."""
        count = like.type.count
        return ir.Constant(like.type, [value] * count if isinstance(value, int) else list(value))

    def floats(self, integers: ir.Value, *, signed: bool) -> ir.Value:
        """A vector of small integers as float32."""
        wide = ir.VectorType(I32, integers.type.count)
        if integers.type.element != I32:
            integers = (self.b.sext if signed else self.b.zext)(integers, wide)
        return self.b.sitofp(integers, ir.VectorType(F32, integers.type.count))

    def times(self, scale: ir.Value, integers: ir.Value, *, signed: bool = False) -> ir.Value:
        """scale * integers, a vector of float32."""
        return exact_product(self.b, self.splat(scale, integers.type.count), self.floats(integers, signed=signed))

    def _at(self, offset: int) -> ir.Value:
        return address(self.b, self.base, ir.Constant(I64, offset), 1)


@dataclass(frozen=True)
class Scales:
    """A block's scales and minimums, vectors of float32, one lane for each `scale_length` weights."""

    scale: ir.Value
    minimum: ir.Value | None = None


def nibbles(block: Block, offset: int) -> ir.Value:
    """32 codes of 4 bits from 16 bytes: the low ones, then the high ones."""
    both, b = block.vector(offset, 16), block.b
    low = b.and_(both, block.constant(15, both))
    high = b.lshr(both, block.constant(4, both))
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


@dataclass(frozen=True)
class BlockFormat(WeightFormat):
    """Blocks of weights with scales: weight = scale * (code - offset) - minimum."""

    scale_length: int
    """Weights that share a scale: 16 or 32."""
    offset: int
    """What is subtracted from a code."""
    largest_code: int
    codes: Callable[[Block, int], ir.Value]
    """Generates 32 codes, unsigned bytes: those of a block's group of this number."""
    scales: Callable[[Block], Scales]
    """Generates a block's scales and minimums."""
    encoder: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
    """Compiled: writes blocks (uint8, flat) for values (float32, flat), rounded to nearest with the type's search for
    scales. Between them stand weights of the values' errors (float32, flat), or none."""
    weighting: Weighting | None = None
    """How importances weight errors; None: the type is rounded without."""
    codes_of_pair: Callable[[Block, int], ir.Value] | None = None
    """Generates 64 codes, those of groups 2 i and 2 i + 1, in 512 bits; None: those of `codes`, joined."""

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block_length // GROUP

    @property
    def has_minimum(self) -> bool:
        """Whether a minimum is subtracted: where no offset is."""
        return self.offset == 0

    def pair(self, block: Block, i: int) -> ir.Value:
        """Generates the 64 codes of groups 2 i and 2 i + 1."""
        if self.codes_of_pair is not None:
            return self.codes_of_pair(block, i)
        first, second = (self.codes(block, group) for group in (2 * i, 2 * i + 1))
        return block.b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 2 * GROUP), [*range(2 * GROUP)]))

    def lanes_of(self, group: int, lanes: int, part: int) -> int:
        """The lane of `Scales` that holds for this vector of `lanes` weights of a group."""
        return (GROUP * group + lanes * part) // self.scale_length

    def decode_group(self, block: Block, scales: Scales, group: int) -> list[ir.Value]:
        """Generates a group's 32 weights as float32, in vectors of the tier's lanes."""
        b, lanes = block.b, block.variant.tier.lanes
        codes = self.codes(block, group)
        if self.offset:
            codes = b.sub(codes, block.constant(self.offset - (256 if self.offset > 127 else 0), codes))
        result = []
        for part in range(GROUP // lanes):
            at = [self.lanes_of(group, lanes, part)] * lanes
            values = block.floats(picked(b, codes, range(lanes * part, lanes * part + lanes)), signed=bool(self.offset))
            weights = exact_product(b, picked(b, scales.scale, at), values)
            if scales.minimum is not None:
                weights = b.fsub(weights, picked(b, scales.minimum, at), flags=_STRICT)
            result.append(weights)
        return result

    def encode(self, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Quantise float32 weights [..., K]: uint8 [..., bytes of a row]. Raises ValueError as `row_bytes`.

        importance: of each weight, of the same shape, finite and not negative; what an error costs grows with it.
        """
        flat = np.ascontiguousarray(values, np.float32)
        out = np.empty(self.stored_shape(flat.shape), np.uint8)
        weights = np.empty(0, np.float32)
        if importance is not None and self.weighting is not None and flat.size:
            weights = self.weighting.of(flat, importance, self.block_length)
        self.encoder(flat.reshape(-1), weights.reshape(-1), out.reshape(-1))
        return out

"""What Triton's products of int8 share: loads of 16 bytes, activations, and 4-way dot products. Knows no type.

A dot is the twin of a decoder for activations in int8: `dot(row, unit, a, planes, EVEN)` -> float32 [R, P], the
products of units of a row, of 32 or 64 weights each (`Dot.unit` in `triton_decoders`), with the activations at `a`.
row: addresses (int64) of rows, [R, 1]. EVEN: they are multiples of 16. unit: numbers of units in a row, [1, P], each
one that is there. A thread of the GPU has whole units: it loads a unit's codes 16 bytes at a time, and its activations
once for all R rows.

Activations (`gpu/int8_activations.py` makes them) are, for pairs of groups of 32, four planes of 16 int8 a pair: the
two halves of the pair's first group and those of its second one, so that neighbouring threads read neighbouring bytes;
then a scale a group, float32. planes: the number of pairs.

Loads are instructions of PTX, too: each `tl.load` would choose its own layout of threads, and numbers would go from one
to the other through shared memory. Such instructions do not run in Triton's interpreter: there, arithmetic on bytes
gives the same integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at

__all__ = [
    "activations_at",
    "byte_of_16",
    "dot16",
    "float16_at",
    "group_dot",
    "half_bits_at",
    "half_of",
    "int8_at",
    "nibble_dots",
    "scale_at",
    "scales_at",
    "signed_dot16",
    "sum16",
    "unaligned_16",
    "unaligned_32",
    "words_at",
]

INTERPRETED = tl.constexpr(not isinstance(byte_at, triton.JITFunction))


@triton.jit
def words_at(address):
    """The 4 int32 at each address, an int64 that is a multiple of 16; nobody writes there meanwhile."""
    if INTERPRETED:
        word = address.to(tl.pointer_type(tl.int32))
        return tl.load(word), tl.load(word + 1), tl.load(word + 2), tl.load(word + 3)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _shifted(low, high, bits):
    """The 32 bits from bit `bits` (0 to 31) of the 64 of two words on."""
    if INTERPRETED:
        both = (low.to(tl.uint32, bitcast=True).to(tl.uint64)) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
        return (both >> bits.to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, bits], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _parts(row, begin, size: tl.constexpr, EVEN: tl.constexpr):
    """Of `size` bytes from `begin` on: where the 16 bytes with the first one begin, and with the last one; the offset.

    EVEN: the offset is that of all rows, [1, P], so that choosing words by it is prepared once for them.
    """
    if EVEN:
        first, last, offset = row + (begin & -16), row + (begin + (size - 1) & -16), begin & 15
    else:
        first, last = row + begin & -16, row + begin + (size - 1) & -16
        offset = (row + begin).to(tl.int32) & 15
    return first, last, offset


@triton.jit
def unaligned_16(row, begin, EVEN: tl.constexpr):
    """The 4 words at bytes `begin` of rows, from the 16 bytes that the first one lies in and the next ones."""
    first, last, offset = _parts(row, begin, 16, EVEN)
    a0, a1, a2, a3 = words_at(first)
    b0, b1, b2, b3 = words_at(last)
    far = offset >= 8
    a0, a1, a2 = tl.where(far, a2, a0), tl.where(far, a3, a1), tl.where(far, b0, a2)
    a3, b0, b1 = tl.where(far, b1, a3), tl.where(far, b2, b0), tl.where(far, b3, b1)
    far, bits = (offset & 4) != 0, (offset & 3) * 8
    a0, a1, a2 = tl.where(far, a1, a0), tl.where(far, a2, a1), tl.where(far, a3, a2)
    a3, b0 = tl.where(far, b0, a3), tl.where(far, b1, b0)
    return _shifted(a0, a1, bits), _shifted(a1, a2, bits), _shifted(a2, a3, bits), _shifted(a3, b0, bits)


@triton.jit
def unaligned_32(row, begin, EVEN: tl.constexpr):
    """The 8 words at bytes `begin` of rows."""
    first, last, offset = _parts(row, begin, 32, EVEN)
    a0, a1, a2, a3 = words_at(first)
    b0, b1, b2, b3 = words_at(first + 16)
    c0, c1, c2, c3 = words_at(last)
    far = offset >= 8
    a0, a1, a2, a3 = tl.where(far, a2, a0), tl.where(far, a3, a1), tl.where(far, b0, a2), tl.where(far, b1, a3)
    b0, b1, b2, b3 = tl.where(far, b2, b0), tl.where(far, b3, b1), tl.where(far, c0, b2), tl.where(far, c1, b3)
    c0, c1 = tl.where(far, c2, c0), tl.where(far, c3, c1)
    far, bits = (offset & 4) != 0, (offset & 3) * 8
    a0, a1, a2, a3 = tl.where(far, a1, a0), tl.where(far, a2, a1), tl.where(far, a3, a2), tl.where(far, b0, a3)
    b0, b1, b2, b3 = tl.where(far, b1, b0), tl.where(far, b2, b1), tl.where(far, b3, b2), tl.where(far, c0, b3)
    c0 = tl.where(far, c1, c0)
    a0, a1, a2, a3 = _shifted(a0, a1, bits), _shifted(a1, a2, bits), _shifted(a2, a3, bits), _shifted(a3, b0, bits)
    b0, b1, b2, b3 = _shifted(b0, b1, bits), _shifted(b1, b2, bits), _shifted(b2, b3, bits), _shifted(b3, c0, bits)
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _dot4(a, b, onto, SIGNED: tl.constexpr):
    """Of 4 bytes in a word each, those of `b` signed: the sum of their products, plus `onto`, int32."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            first = (a << (24 - 8 * byte)) >> 24
            onto += (first if SIGNED else first & 255) * ((b << (24 - 8 * byte)) >> 24)
        return onto
    if SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, onto], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, onto], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def dot16(a0, a1, a2, a3, b0, b1, b2, b3, onto):
    """Of 16 unsigned bytes and 16 int8 in 4 words each: the sum of their products, plus `onto`, int32."""
    return _dot4(a3, b3, _dot4(a2, b2, _dot4(a1, b1, _dot4(a0, b0, onto, False), False), False), False)


@triton.jit
def signed_dot16(a0, a1, a2, a3, b0, b1, b2, b3, onto):
    """`dot16` of two times 16 int8."""
    return _dot4(a3, b3, _dot4(a2, b2, _dot4(a1, b1, _dot4(a0, b0, onto, True), True), True), True)


@triton.jit
def sum16(b0, b1, b2, b3, onto):
    """The sum of 16 int8 in 4 words, plus `onto`, int32."""
    one = tl.full(b0.shape, 0x01010101, tl.int32)
    return dot16(one, one, one, one, b0, b1, b2, b3, onto)


@triton.jit
def byte_of_16(words, w0, w1, w2, w3):
    """Of 8 codes of 4 bits in a word, the byte in w0 to w3 that each numbers: of the low codes, of the high ones."""
    low, late = words & 0x77777777, 0x32103210 | (words >> 1 & 0x44444444)
    first = _permuted(_permuted(w0, w1, low), _permuted(w2, w3, low), late)
    low, late = low >> 16, late >> 16
    last = _permuted(_permuted(w0, w1, low), _permuted(w2, w3, low), late)
    return _permuted(first, last, 0x6420), _permuted(first, last, 0x7531)


@triton.jit
def _permuted(a, b, selector):
    """The 4 bytes of two words that the low 4 codes of `selector`, 0 to 7, number."""
    if INTERPRETED:
        result = selector * 0
        for byte in tl.static_range(4):
            index = (selector >> (4 * byte)) & 7
            result |= ((tl.where(index < 4, a, b) >> (index % 4 * 8)) & 255) << (8 * byte)
        return result
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def group_dot(c0, c1, c2, c3, d0, d1, d2, d3, a, group, planes):
    """The products of groups of 32 int8, 16 in c0 to c3 and 16 in d0 to d3, with their activations, int32."""
    x0, x1, x2, x3 = activations_at(a, group, 0, planes)
    dots = signed_dot16(c0, c1, c2, c3, x0, x1, x2, x3, tl.zeros(c0.shape, tl.int32))
    x0, x1, x2, x3 = activations_at(a, group, 1, planes)
    return signed_dot16(d0, d1, d2, d3, x0, x1, x2, x3, dots)


@triton.jit
def nibble_dots(c0, c1, c2, c3, x0, x1, x2, x3, y0, y1, y2, y3, low, high):
    """Add to `low` the products of 16 low codes of 4 bits with x, to `high` those of the high ones with y, times 16.

    The high codes are not shifted: that would be an instruction for each word.
    """
    m: tl.constexpr = 0x0F0F0F0F
    n: tl.constexpr = -0x0F0F0F10
    low = dot16(c0 & m, c1 & m, c2 & m, c3 & m, x0, x1, x2, x3, low)
    return low, dot16(c0 & n, c1 & n, c2 & n, c3 & n, y0, y1, y2, y3, high)


@triton.jit
def activations_at(a, group, half, planes):
    """The 16 int8 of a half of groups, as 4 words."""
    plane = group % 2 * 2 + half
    return words_at(a.to(tl.int64) + (plane * planes + group // 2).to(tl.int64) * 16)


@triton.jit
def scale_at(a, group, planes):
    """The scales of groups of activations, float32."""
    address = a.to(tl.int64) + (planes * 64 + group * 4).to(tl.int64)
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.float32)))
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [address], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def scales_at(a, pair, planes):
    """The scales of both groups of pairs."""
    address = a.to(tl.int64) + (planes * 64 + pair * 8).to(tl.int64)
    if INTERPRETED:
        scale = address.to(tl.pointer_type(tl.float32))
        return tl.load(scale), tl.load(scale + 1)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.f32 {$0, $1}, [$2];",
        "=f,=f,l",
        [address],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def int8_at(address):
    """The signed byte at each address, an int64, as int32."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int8))).to(tl.int32)
    return tl.inline_asm_elementwise(
        "ld.global.nc.s8 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def half_bits_at(address):
    """The 16 bits at each even address, an int64, as int32."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.uint16))).to(tl.int32)
    return tl.inline_asm_elementwise(
        "ld.global.nc.u16 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def float16_at(address):
    """The float16 at each even address, an int64, as float32."""
    return half_of(half_bits_at(address))


@triton.jit
def half_of(word):
    """The float16 in the low half of a word, as float32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

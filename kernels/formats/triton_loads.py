"""What Triton's decoders share: loads of a block's numbers, and codes of 4 bits. Needs Triton; knows no type.

A decoder is the twin of a `BlockFormat` on a GPU: `decode(row, group, lane, mask)` -> float32, the weights of groups of
32, [R, G, 32]. row: addresses (uint8 pointers) of rows, [R, 1]. group: numbers of groups in a row, [1, G]. lane: 0 to
31. mask: where there is such a group, [R, G]; others are 0. Scales are loaded for groups, [R, G], before they are
broadcast: as [R, G, 1] each thread would load them once for every weight. Products and sums are those of
`gguf.quants`, in the same order: compiled without fused multiply-adds (`enable_fp_fusion=False`), every bit is the
same.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["byte_at", "bytes_at", "half_at", "nibbles_at", "signed_at", "signed_bytes_at"]


@triton.jit
def half_at(address, mask):
    """The float16 at each address, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def byte_at(address, mask):
    """The unsigned byte at each address, as int32."""
    return tl.load(address, mask=mask, other=0).to(tl.int32)


@triton.jit
def signed_at(address, mask):
    """The signed byte at each address, as int32."""
    return tl.load(address.to(tl.pointer_type(tl.int8), bitcast=True), mask=mask, other=0).to(tl.int32)


@triton.jit
def bytes_at(address, index, mask):
    """The unsigned byte `index` [32] after each address [R, G], as int32 [R, G, 32]."""
    return byte_at(address[:, :, None] + index[None, None, :], mask[:, :, None])


@triton.jit
def signed_bytes_at(address, index, mask):
    """The signed byte `index` [32] after each address [R, G], as int32 [R, G, 32]."""
    return signed_at(address[:, :, None] + index[None, None, :], mask[:, :, None])


@triton.jit
def nibbles_at(address, lane, mask):
    """A group's 32 codes of 4 bits in 16 bytes from each address on: the low ones, then the high ones."""
    return (bytes_at(address, lane % 16, mask) >> (lane // 16 * 4)[None, None, :]) & 15

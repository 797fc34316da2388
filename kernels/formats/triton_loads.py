"""What Triton's decoders share: loads of a block's numbers, and codes of 4 bits. Needs Triton; knows no type.

A decoder is the twin of a `BlockFormat` on a GPU: `decode(row, group, lane, mask)` -> float32, the weights of groups of
32. row: addresses (uint8 pointers) of rows, [R, 1, 1]. group: numbers of groups in a row, [1, G, 1]. lane: 0 to 31,
[1, 1, 32]. mask: where there is such a group, as broadcast to [R, G, 1]; others are 0. A scale is loaded once for its
group. Products and sums are those of `gguf.quants`, in the same order: compiled without fused multiply-adds
(`enable_fp_fusion=False`), every bit is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["byte_at", "half_at", "nibble_at", "signed_at"]


@triton.jit
def half_at(address, mask):  # noqa: ANN201  # Triton's own values, as in all of these
    """The float16 at each address, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def byte_at(address, mask):  # noqa: ANN201
    """The unsigned byte at each address, as int32."""
    return tl.load(address, mask=mask, other=0).to(tl.int32)


@triton.jit
def signed_at(address, mask):  # noqa: ANN201
    """The signed byte at each address, as int32."""
    return tl.load(address.to(tl.pointer_type(tl.int8), bitcast=True), mask=mask, other=0).to(tl.int32)


@triton.jit
def nibble_at(address, lane, mask):  # noqa: ANN201
    """A group's 32 codes of 4 bits in 16 bytes from each address on: the low ones, then the high ones."""
    return (byte_at(address + lane % 16, mask) >> (lane // 16 * 4)) & 15

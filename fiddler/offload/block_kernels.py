"""A Triton kernel that decodes rows of quantised weights in a GPU's memory. Knows formats' decoders; no model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.formats.block_format import GROUP
from fiddler.kernels.formats.triton_decoders import DECODERS

__all__ = ["decode_rows"]


@triton.jit
def _decode(
    stored,
    ids,
    out,
    groups,
    row_bytes,
    DECODE: tl.constexpr,
    BY_ID: tl.constexpr,
    G: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    source = tl.load(ids + r) if BY_ID else r
    group = (tl.program_id(1) * G + tl.arange(0, G))[None, :]
    lane = tl.arange(0, 32)
    row = stored + (source * row_bytes + tl.zeros([1, 1], tl.int64))
    inside = group < groups
    values = DECODE(row, group, lane, inside)
    target = (out + r * groups * 32) + group[:, :, None] * 32 + lane[None, None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside[:, :, None])


def decode_rows(stored: Tensor, kind: str, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """Rows of weights, stored as uint8 [N, bytes of a row] in the format `kind` -> [N, K] in `dtype`.

    ids: int64 [n], the rows to decode, [n, K]; None: all, in order. As float32 every bit is as `gguf` computes it.
    """
    columns = BLOCK_FORMATS[kind].columns(stored.shape[1])
    count = len(stored) if ids is None else ids.numel()
    out = torch.empty(count, columns, dtype=dtype, device=stored.device)
    groups = columns // GROUP
    g = min(64, triton.next_power_of_2(groups))
    if out.numel():
        _decode[(count, triton.cdiv(groups, g))](
            stored,
            stored if ids is None else ids,
            out,
            groups,
            stored.shape[1],
            DECODE=DECODERS[kind],
            BY_ID=ids is not None,
            G=g,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out

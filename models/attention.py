"""Causal grouped-query attention in plain torch. Knows shapes; not how keys and values are stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]

_MASK_ELEMENTS = 1 << 22  # masked attention goes over the queries in pieces whose mask is at most this large
_BLOCK = 4096  # positions of the past that are attended to at once
# what torch's scaled_dot_product_attention calls on a CPU; it also gives the logarithms of the softmax's sums
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Causal grouped-query attention of the last n positions: q [n, H, head_dim] -> [n, H, head_dim] float32.

    keys and values [S, G, head_dim]: query i is position S - n + i and sees the positions up to its own, at most
    the last `window` of them. Keys and values may be stored in 16 bits; the arithmetic is float32. Memory does not
    grow with S.
    """
    n, total = len(q), len(keys)
    if q.is_cuda and keys.dtype == torch.float16 and (window is None or total <= window):
        return _attend_in_16_bits(q, keys, values)
    if window is not None:
        seen = slice(max(0, total - n - window + 1), None)  # by any of the queries
        keys, values = keys[seen], values[seen]
    if n > 1 and (q.is_cuda or (window is not None and len(keys) > window)):
        return _attend_masked(q.float(), keys, values, window)
    return _attend_in_blocks(q.float(), keys, values)


def _attend_in_blocks(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend` without a window, block by block.

    They are put together by the sums of their exponentials (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """
    n, heads, head_dim = q.shape
    blocks = _blocks(q, keys, values)
    made, sums = next(blocks)
    out, total = made.reshape(heads, n, head_dim), sums.reshape(heads, n, 1)
    for made, sums in blocks:
        sums = sums.reshape(heads, n, 1)
        both = torch.logaddexp(total, sums)
        out = out * torch.exp(total - both) + made.reshape(heads, n, head_dim) * torch.exp(sums - both)
        total = both
    return out.transpose(0, 1).contiguous()


def _blocks(q: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention to some positions at a time: what it gives, and the logarithm of the sum of its exponentials."""
    n, heads, head_dim = q.shape
    groups, past = keys.shape[1], len(keys)
    if n > 1:  # their own positions, causally
        past -= n
        k, v = (some[past:].transpose(0, 1).float() for some in (keys, values))  # [G, n, head_dim]
        k, v = (some.repeat_interleave(heads // groups, 0) for some in (k, v))
        yield _FLASH(q.transpose(0, 1)[None], k[None], v[None], 0.0, True)
        if past == 0:
            return
    # the queries that share a KV head stand together, so keys and values of the past are never repeated
    grouped = q.view(n, groups, -1, head_dim).permute(1, 2, 0, 3).reshape(groups, -1, head_dim)  # [G, H / G * n, d]
    for begin in range(0, past, _BLOCK):
        k, v = (some[begin : min(begin + _BLOCK, past)].transpose(0, 1).float() for some in (keys, values))
        if n > 1:
            yield _FLASH(grouped[None], k[None], v[None])
        else:  # torch's takes ten times as long for so few queries of many keys
            scores = torch.bmm(grouped * head_dim**-0.5, k.transpose(1, 2))
            shares = torch.softmax(scores, -1)
            yield torch.bmm(shares, v), scores.amax(-1) - shares.amax(-1).log()


def _attend_masked(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """`attend` with a mask for each piece of the queries."""
    n, heads, head_dim = q.shape
    total, groups = keys.shape[:2]
    repeat = heads // groups
    grouped = q.view(n, groups, repeat, head_dim).transpose(0, 1)  # [G, n, H / G, head_dim]
    k, v = keys.transpose(0, 1).float(), values.transpose(0, 1).float()  # [G, S, head_dim]
    out = torch.empty_like(grouped)
    step = max(1, _MASK_ELEMENTS // (repeat * total))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        first, last = total - n + begin, total - n + end  # positions of this piece
        oldest = 0 if window is None else max(0, first - window + 1)
        position = torch.arange(first, last, device=q.device)[:, None]
        key = torch.arange(oldest, last, device=q.device)[None]
        mask = key <= position
        if window is not None:
            mask &= key > position - window
        mask = mask.repeat_interleave(repeat, 0)
        piece = grouped[:, begin:end].reshape(1, groups, -1, head_dim)
        result = F.scaled_dot_product_attention(piece, k[None, :, oldest:last], v[None, :, oldest:last], mask)
        out[:, begin:end] = result.view(groups, end - begin, repeat, head_dim)
    return out.transpose(0, 1).reshape(n, heads, head_dim)


def _attend_in_16_bits(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend` through the GPU's fused kernel, products in 16 bits and sums in float32."""
    n, total, shape = len(q), len(keys), q.shape
    q, k, v = (tensor.to(torch.float16).transpose(0, 1)[None] for tensor in (q, keys, values))  # [1, H or G, n or S, d]
    if n == total:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        repeat = q.shape[1] // k.shape[1]
        out = _attend_behind(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    return out[0].transpose(0, 1).float().reshape(shape)


def _attend_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n of S positions: q [1, H, n, head_dim], k and v [1, H, S, head_dim] -> as q."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if q.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        # what torch calls for its `causal_lower_right`, whose import takes a second and brings the compiler along
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return attended
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]))

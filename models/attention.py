"""Causal grouped-query attention in plain torch. Knows shapes; not how the KV cache stores keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Rows", "attend"]

_MASK_ELEMENTS = 1 << 22  # largest mask; longer masked attention goes through the queries in chunks
_WIDEST_FUSED = 256  # head_dim that the GPU's fused kernel takes
_BLOCK = 4096  # cached positions that one call attends to
# torch's scaled_dot_product_attention calls this kernel on a CPU; here it also returns the log-sum-exp of each row
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Rows(Protocol):
    """Keys or values [S, G, head_dim] in whatever memory: a tensor, or what gives one for each slice of positions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[S, G, head_dim]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of each element."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, positions: slice, /) -> Tensor: ...


def attend(q: Tensor, keys: Rows, values: Rows, window: int | None, sinks: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention of the last n of S positions: q [n, H, head_dim] -> [n, H, head_dim] float32.

    keys and values [S, G, head_dim]: query i is position S - n + i and attends to the positions up to its own, at
    most the last `window` of them. Keys and values may have 16 bits; the arithmetic is float32, except on a GPU for
    fp16 keys that the window does not cut: 16-bit products, float32 sums. On a CPU, memory does not grow with S.
    sinks: float32 [H], a logit of each head that the softmax has beside its scores; it adds nothing to the output, and
    the arithmetic is float32.
    """
    n, total = len(q), len(keys)
    fused = q.shape[-1] <= _WIDEST_FUSED and (window is None or total <= window)
    if q.is_cuda and keys.dtype == torch.float16 and fused and sinks is None:
        return _attend_fp16(q, keys[:], values[:])
    if window is not None:
        visible = slice(max(0, total - n - window + 1), total)  # to any of the queries
        keys, values = keys[visible], values[visible]
    if n > 1 and (q.is_cuda or (window is not None and len(keys) > window)):
        return _attend_masked(q.float(), keys[:], values[:], window, sinks, whole=sinks is not None and q.is_cuda)
    return _attend_in_blocks(q.float(), keys, values, sinks)


def _attend_in_blocks(q: Tensor, keys: Rows, values: Rows, sinks: Tensor | None) -> Tensor:
    """`attend` without a window, block by block.

    Log-sum-exps merge the blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """
    n, heads, head_dim = q.shape
    blocks = _blocks(q, keys, values)
    block, block_lse = next(blocks)
    out, lse = block.reshape(heads, n, head_dim), block_lse.reshape(heads, n, 1)
    for block, block_lse in blocks:
        block_lse = block_lse.reshape(heads, n, 1)
        merged_lse = torch.logaddexp(lse, block_lse)
        out = out * torch.exp(lse - merged_lse) + block.reshape(heads, n, head_dim) * torch.exp(block_lse - merged_lse)
        lse = merged_lse
    if sinks is not None:  # the sink's term of the softmax's denominator
        out = out * torch.sigmoid(lse - sinks[:, None, None])
    return out.transpose(0, 1).contiguous()


def _blocks(q: Tensor, keys: Rows, values: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention to one block of positions at a time: its output and the log-sum-exp of its scores."""
    n, heads, head_dim = q.shape
    groups, past = keys.shape[1], len(keys)
    if n > 1:  # the queries' own positions, causally
        past -= n
        k, v = (rows[past : past + n].transpose(0, 1).float() for rows in (keys, values))  # [G, n, head_dim]
        k, v = (tensor.repeat_interleave(heads // groups, 0) for tensor in (k, v))
        yield _FLASH(q.transpose(0, 1)[None], k[None], v[None], 0.0, True)
        if past == 0:
            return
    # queries of one KV head lie together, so the past's keys and values are never repeated
    grouped = q.view(n, groups, -1, head_dim).permute(1, 2, 0, 3).reshape(groups, -1, head_dim)  # [G, H / G * n, d]
    for begin in range(0, past, _BLOCK):
        k, v = (rows[begin : min(begin + _BLOCK, past)].transpose(0, 1).float() for rows in (keys, values))
        if n > 1:
            yield _FLASH(grouped[None], k[None], v[None])
        else:  # torch's kernel takes ten times as long for so few queries of many keys
            scores = torch.bmm(grouped * head_dim**-0.5, k.transpose(1, 2))
            probabilities = torch.softmax(scores, -1)
            yield torch.bmm(probabilities, v), scores.amax(-1) - probabilities.amax(-1).log()


def _attend_masked(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, *, whole: bool
) -> Tensor:
    """`attend` with an explicit mask, a chunk of queries at a time. whole: see `_attend_whole`."""
    n, heads, head_dim = q.shape
    total, groups = keys.shape[:2]
    repeat = heads // groups
    grouped = q.view(n, groups, repeat, head_dim).transpose(0, 1)  # [G, n, H / G, head_dim]
    k, v = keys.transpose(0, 1).float(), values.transpose(0, 1).float()  # [G, S, head_dim]
    out = torch.empty_like(grouped)
    step = max(1, _MASK_ELEMENTS // ((heads if whole else repeat) * total))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        first, last = total - n + begin, total - n + end  # positions of this chunk
        oldest = 0 if window is None else max(0, first - window + 1)
        position = torch.arange(first, last, device=q.device)[:, None]
        key = torch.arange(oldest, last, device=q.device)[None]
        mask = key <= position
        if window is not None:
            mask &= key > position - window
        mask = mask.repeat_interleave(repeat, 0)
        chunk = grouped[:, begin:end].reshape(1, groups, -1, head_dim)
        visible = k[None, :, oldest:last], v[None, :, oldest:last]
        if sinks is None:
            result = F.scaled_dot_product_attention(chunk, *visible, mask)
        else:
            of_rows = sinks.view(groups, 1, repeat).expand(-1, end - begin, -1).reshape(1, groups, -1, 1)
            result = (_attend_whole if whole else _attend_flash)(chunk, *visible, mask, of_rows)
        out[:, begin:end] = result.view(groups, end - begin, repeat, head_dim)
    return out.transpose(0, 1).reshape(n, heads, head_dim)


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """Masked attention with sinks on a CPU: q [1, G, n, d], k and v [1, G, S, d], mask [n, S], sinks [1, G, n, 1]."""
    bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    result, lse = _FLASH(q, k, v, 0.0, False, attn_mask=bias[None, None])
    out: Tensor = result * torch.sigmoid(lse[..., None] - sinks)
    return out


def _attend_whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """`_attend_flash` on any device: the scores of all heads lie in memory."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill_(~mask, -torch.inf)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ v


def _attend_fp16(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend` through the GPU's fused kernel: 16-bit products, float32 sums."""
    n, total, shape = len(q), len(keys), q.shape
    q, k, v = (tensor.to(torch.float16).transpose(0, 1)[None] for tensor in (q, keys, values))  # [1, H or G, n or S, d]
    if n == total:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        repeat = q.shape[1] // k.shape[1]
        out = _attend_lower_right(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    return out[0].transpose(0, 1).float().reshape(shape)


def _attend_lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n of S positions: q [1, H, n, head_dim], k and v [1, H, S, head_dim] -> as q."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if q.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        # torch calls this for its `causal_lower_right`, whose import takes a second and loads the compiler
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]))

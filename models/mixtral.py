"""Mixtral's forward pass (Jiang et al. 2024, https://arxiv.org/abs/2401.04088), as GGUF lays its weights out.

Knows shapes and the order of operations. Does not know where experts run, how a linear layer multiplies, or how
keys and values are stored: it is handed all three. Attribute names are the tensor names in the file. Letters are
explained in `config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.config import Config

__all__ = [
    "Block",
    "Cache",
    "Experts",
    "Linear",
    "Mixtral",
    "Norm",
    "Router",
    "attend",
    "rms_norm",
    "rotary_frequencies",
    "rotary_turns",
    "rotate",
    "route",
]

_MASK_ELEMENTS = 1 << 22  # masked attention goes over the queries in pieces whose mask is at most this large
_BLOCK = 4096  # positions of the past that are attended to at once
# what torch's scaled_dot_product_attention calls on a CPU; it also gives the logarithms of the softmax's sums
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Experts(Protocol):
    """Computes a layer's routed experts, wherever they live."""

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, D] float32, ids [T, K], weights [T, K] -> the weighted sum of the experts' outputs, [T, D]."""
        ...


class Linear(Protocol):
    """Multiplies by a named weight of the file."""

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """x [T, in] float32 -> x . weight transposed, [T, out] float32; plus `onto`, of that shape."""
        ...

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The same for several weights that take the same x."""
        ...


class Cache(Protocol):
    """Keeps keys and values of the sequences of a step; knows the position of each of its rows."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q [T, H, head_dim] and k [T, G, head_dim] to their positions, store k and v [T, G, head_dim].

        Then causal attention of each row over its own sequence: [T, H, head_dim] float32.
        """
        ...


class Router(Protocol):
    """Normalises what goes to the experts, and chooses each token's."""

    def __call__(
        self, h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, D], norm [D], weight [E, D] -> what `route` gives."""
        ...


def route(h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of h, and the K most probable experts with their probabilities, summing to 1: [T, D], [T, K], [T, K]."""
    x = rms_norm(h, norm, epsilon)
    weights, ids = torch.topk(torch.softmax(F.linear(x, weight), -1), k)
    return x, ids, weights / weights.sum(-1, keepdim=True)


class Norm(Protocol):
    """RMS normalisation (Zhang and Sennrich 2019)."""

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D]."""
        ...


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The `Norm` in plain torch."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


class Mixtral:
    """The model: embeddings, blocks, final norm, output."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Tensor],
        linear: Linear,
        experts: Experts,
        router: Router = route,
        norm: Norm = rms_norm,
    ) -> None:
        """`weights`: the tensors that are not multiplied by `linear`: embeddings, norms and routers."""
        self.config = config
        self.token_embd = weights["token_embd.weight"]  # [V, D]
        self.blk = [Block(config, index, weights, linear, router, norm) for index in range(config.block_count)]
        self.output_norm = weights["output_norm.weight"]
        self._linear, self._norm = linear, norm
        self.experts = experts

    def __call__(self, ids: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """One step: ids [T] of the rows that `cache` knows the places of -> hidden states [T, D] float32.

        wanted: the rows whose hidden states are returned, [W, D]; None: all. Behind its attention, whose keys and
        values are kept, the last block computes no others.
        """
        h = self.token_embd[ids].float()
        for layer, block in enumerate(self.blk):
            last = layer == len(self.blk) - 1
            h, x, chosen, weights = block.before_experts(h, cache, wanted if last else None)
            h = h + self.experts(layer, x, chosen, weights)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V] float32."""
        return self._linear(self._norm(h, self.output_norm, self.config.rms_epsilon), "output.weight")


class Block:
    """One transformer block; its experts are the caller's business."""

    def __init__(
        self,
        config: Config,
        index: int,
        weights: Mapping[str, Tensor],
        linear: Linear,
        router: Router,
        norm: Norm,
    ) -> None:
        self.config, self.index = config, index
        self.attn_norm = weights[f"blk.{index}.attn_norm.weight"]
        self.ffn_norm = weights[f"blk.{index}.ffn_norm.weight"]
        self.ffn_gate_inp = weights[f"blk.{index}.ffn_gate_inp.weight"]  # [E, D]
        self._linear, self._router, self._norm = linear, router, norm

    def before_experts(
        self, h: Tensor, cache: Cache, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The dense half: h [T, D] -> h after attention, the experts' input x [T, D], ids and weights [T, K].

        wanted: only of these rows.
        """
        h = self._attention(h, self._norm(h, self.attn_norm, self.config.rms_epsilon), cache, wanted)
        k = self.config.expert_used_count
        return h, *self._router(h, self.ffn_norm, self.config.rms_epsilon, self.ffn_gate_inp, k)

    def _attention(self, h: Tensor, x: Tensor, cache: Cache, wanted: Tensor | None) -> Tensor:
        """h and what attention to x, the normalised h, adds to it; of the rows that are wanted."""
        prefix = f"blk.{self.index}."
        made = self._linear.together(x, [f"{prefix}attn_{part}.weight" for part in "qkv"])
        q, k, v = (tensor.view(len(x), -1, self.config.head_dim) for tensor in made)  # [T, H or G, head_dim]
        attended = cache.attend(self.index, q, k, v).flatten(1)
        if wanted is not None:
            h, attended = h[wanted], attended[wanted]
        return self._linear(attended, prefix + "attn_output.weight", h)


def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians a position, of each pair of a head's elements (RoFormer): float32 [head_dim / 2]."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / config.rope_freq_base ** (pairs / config.head_dim)


def rotary_turns(config: Config, positions: Tensor) -> Tensor:
    """What turns each pair of a head's elements to its position: complex64 [T, 1, head_dim / 2]."""
    angles = positions[:, None].float() * rotary_frequencies(config, positions.device)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs (GGUF's order), which are complex numbers: x [T, heads, head_dim]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


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

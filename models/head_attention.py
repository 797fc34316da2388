"""A block's grouped-query attention: projections, biases, norms of queries and keys. Knows no KV cache, no backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fiddler.models.architecture import Role, Rotary
from fiddler.models.config import Config
from fiddler.models.interfaces import Cache, Heads, Linear, Norm
from fiddler.models.router import centred

__all__ = ["Attention"]


class Attention:
    """A block's attention over heads' keys and values, with its norm and its residual."""

    def __init__(
        self, config: Config, index: int, weights: Mapping[str, Tensor], linear: Linear, norm: Norm, heads: Heads
    ) -> None:
        self._config, self._index, self._linear, self._norm, self._make_heads = config, index, linear, norm, heads
        name = partial(config.architecture.tensor_name, layer=index)
        self.norm_weight = weights[name(Role.ATTENTION_NORM)]
        fused = config.has(Role.QUERY_KEY_VALUE)
        roles = (Role.QUERY_KEY_VALUE,) if fused else (Role.QUERY, Role.KEY, Role.VALUE)
        self._qkv = [name(role) for role in roles]
        self._output = name(Role.ATTENTION_OUTPUT)
        biases = (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS)
        self._biases = [weights[name(role)] for role in biases if config.has(role)]
        self._output_bias = weights[name(Role.OUTPUT_BIAS)] if config.has(Role.OUTPUT_BIAS) else None
        self._sinks = weights[name(Role.SINKS)] if config.has(Role.SINKS) else None
        self._qk_norms = [weights[name(role)] for role in (Role.QUERY_NORM, Role.KEY_NORM) if config.has(role)]

    def __call__(
        self, h: Tensor, cache: Cache, wanted: Tensor | None = None, normalised: Tensor | None = None
    ) -> Tensor:
        """h [T, D] + attention of the normalised h: the rows in `wanted`, [W, D]. Stores keys and values of all.

        normalised: that h by `norm_weight`, where the caller has it.
        """
        x = normalised
        if x is None:
            x = self._norm(centred(h, self._config.architecture.norm), self.norm_weight, self._config.rms_epsilon)
        q, k, v = self._heads(self._linear.together(x, self._qkv))
        attended = cache.attend(self._index, q, k, v, self._sinks).flatten(1)
        if wanted is not None:
            h, attended = h[wanted], attended[wanted]
            if not len(wanted):
                return h
        if self._output_bias is not None:
            h = h + self._output_bias
        if self._config.residual_scale == 1.0:
            return self._linear(attended, self._output, h)
        return h + self._linear(attended, self._output) * self._config.residual_scale

    def _heads(self, qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Products [T, H or G * head_dim] -> q [T, H, head_dim], k and v [T, G, head_dim], as a cache takes them.

        qkv: the three, or one of all.
        """
        config, head_dim = self._config, self._config.head_dim
        if len(qkv) == 1:
            keys = config.head_count_kv * head_dim
            qkv = torch.split(qkv[0], [config.head_count * head_dim, keys, keys], 1)
        for tensor, bias in zip(qkv, self._biases, strict=False):
            tensor += bias
        q, k, v = qkv
        halves = config.rotated if config.architecture.rotary is Rotary.HALVES else 0
        q, k = self._make_heads(q, k, self._qk_norms, config.rms_epsilon, head_dim, halves)
        v = v.view(len(v), -1, head_dim)
        if config.clamp_kqv is not None:
            q, k, v = (tensor.clamp(-config.clamp_kqv, config.clamp_kqv) for tensor in (q, k, v))
        if config.attention_scale is not None:
            q = q * (config.attention_scale * head_dim**0.5)
        if config.rotated_scale != 1.0:  # of queries and of keys
            q[..., : config.rotated] *= config.rotated_scale**2
        return q, k, v

"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434), in its absorbed form. Knows no backend.

A position's keys and values are products of one latent, which all heads share. Here each head's query is multiplied by
the matrix of its keys instead, and what it attends to by the matrix of its values: so the KV cache holds one rotated
key and one latent a position, and the attention is that of H heads to one KV head, whose values are its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fiddler.models.architecture import Role
from fiddler.models.config import Config
from fiddler.models.interfaces import Cache, Linear, Norm
from fiddler.models.router import centred

__all__ = ["LatentAttention", "per_head_matrices"]

_EPSILON = 1e-6  # of the norms of the latent and of queries: transformers', whatever the model's other norms have


class LatentAttention:
    """A block's latent attention, with its norm and its residual."""

    def __init__(self, config: Config, index: int, weights: Mapping[str, Tensor], linear: Linear, norm: Norm) -> None:
        assert config.latent is not None
        self._config, self._widths, self._index = config, config.latent, index
        self._linear, self._norm = linear, norm
        name = partial(config.architecture.tensor_name, layer=index)
        self.norm_weight, self._latent_norm = weights[name(Role.ATTENTION_NORM)], weights[name(Role.LATENT_NORM)]
        self._first = [name(Role.QUERY_DOWN if config.latent.query else Role.QUERY), name(Role.LATENT)]
        self._query_up, self._query_norm = name(Role.QUERY_UP), None
        if config.latent.query:
            self._query_norm = weights[name(Role.QUERY_DOWN_NORM)]
        self._key_up, self._value_up = name(Role.KEY_UP), name(Role.VALUE_UP)
        self._output = name(Role.ATTENTION_OUTPUT)
        scaling = config.rope_scaling
        # a cache divides scores by the root of head_dim
        self._scale = (config.head_dim / config.latent.key) ** 0.5 * (1.0 if scaling is None else scaling.score_scale)

    def __call__(
        self, h: Tensor, cache: Cache, wanted: Tensor | None = None, normalised: Tensor | None = None
    ) -> Tensor:
        """h [T, D] + attention of the normalised h: the rows in `wanted`, [W, D]. Stores the latents of all.

        normalised: that h by `norm_weight`, where the caller has it.
        """
        config, rotated, x = self._config, self._config.rotated, normalised
        if x is None:
            x = self._norm(centred(h, config.architecture.norm), self.norm_weight, config.rms_epsilon)
        q, latent = self._linear.together(x, self._first)
        key = self._key(latent)  # [T, 1, head_dim]
        attended = cache.attend(self._index, self._queries(q), key, key)[..., rotated:]  # [T, H, latent]
        if wanted is not None:
            h, attended = h[wanted], attended[wanted]
            if not len(wanted):
                return h
        return self._linear(self._linear.per_head(attended, self._value_up).flatten(1), self._output, h)

    def _queries(self, q: Tensor) -> Tensor:
        """The first product [T, query or H * key] -> queries of the cached vectors, [T, H, head_dim], rotated first."""
        if self._query_norm is not None:
            q = self._linear(self._norm(q, self._query_norm, _EPSILON), self._query_up)
        plain_width = self._widths.key - self._config.rotated
        heads = q.view(len(q), -1, self._widths.key)
        plain, rotated = heads[..., :plain_width], heads[..., plain_width:]
        rotated = rotated * (self._scale * self._config.rotated_scale**2)
        return torch.cat([rotated, self._linear.per_head(plain * self._scale, self._key_up)], -1)

    def _key(self, latent: Tensor) -> Tensor:
        """The product [T, latent + rotated] -> what the cache holds, [T, 1, head_dim]: the rotated elements first."""
        width = self._widths.latent
        normalised = self._norm(latent[:, :width].contiguous(), self._latent_norm, _EPSILON)
        return torch.cat([latent[:, width:], normalised], -1)[:, None]


def per_head_matrices(config: Config, layer: int, kv_b: Tensor) -> dict[str, Tensor]:
    """The heads' matrices of keys and values, by name, as views of one tensor of both [H * (key + value), latent].

    As files from before 2025 have it.
    """
    assert config.latent is not None
    plain = config.latent.key - config.rotated
    heads = kv_b.view(config.head_count, plain + config.latent.value, -1)
    name = partial(config.architecture.tensor_name, layer=layer)
    return {name(Role.KEY_UP): heads[:, :plain].transpose(1, 2), name(Role.VALUE_UP): heads[:, plain:]}

"""The forward pass of every declared architecture in torch, with GGUF's weight layout.

Knows shapes and the order of operations; not where experts run, how a linear layer multiplies, or how the KV cache
stores keys and values: these come as arguments. Attribute names are the tensor names in the file; `config.py`
explains the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from fiddler.errors import FileFormatError
from fiddler.models import ARCHITECTURES, DENSE_ARCHITECTURES
from fiddler.models.architecture import Norm as NormKind, Role, first_unknown
from fiddler.models.config import Config
from fiddler.models.head_attention import Attention
from fiddler.models.interfaces import Cache, Embeddings, Experts, Heads, Linear, Norm, Router, RouterWeights
from fiddler.models.latent_attention import LatentAttention
from fiddler.models.rotary import heads
from fiddler.models.router import centred, rms_norm, route

__all__ = ["Block", "Transformer"]

_RUNS = (*ARCHITECTURES.values(), *DENSE_ARCHITECTURES.values())  # architectures whose parts this file knows


class Transformer:
    """The model: embeddings, blocks, final norm, output."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Tensor],
        linear: Linear,
        experts: Experts,
        router: Router = route,
        norm: Norm = rms_norm,
        dense_span: Callable[[], AbstractContextManager[None]] = nullcontext,
        token_embd: Embeddings | None = None,
        make_heads: Heads = heads,
    ) -> None:
        """weights: the tensors that `linear` does not multiply by: embeddings, norms and routers.

        dense_span: its context surrounds the dense half of each block: all but the experts. token_embd: embeddings that
        are not in `weights`. make_heads: of queries and keys, where attention is no latent attention.
        Raises FileFormatError for an architecture with a part that does not run.
        """
        unknown = first_unknown(config.architecture, _RUNS)
        if unknown is not None:
            raise FileFormatError(f"{config.architecture.name} has {unknown}, which does not run")
        name = config.architecture.tensor_name
        self.config = config
        self.token_embd: Embeddings = (
            weights[name(Role.TOKEN_EMBEDDING)] if token_embd is None else token_embd
        )  # [V, D]
        parts = weights, linear, router, norm, make_heads
        self.blk = [Block(config, index, *parts) for index in range(config.block_count)]
        self.output_norm, self._output = weights[name(Role.OUTPUT_NORM)], name(Role.OUTPUT)
        self._linear, self._norm, self._dense_span = linear, norm, dense_span
        self.experts = experts

    def __call__(self, ids: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """One step: token ids [T], whose positions `cache` knows -> hidden states [T, D] float32.

        wanted: the W rows to return hidden states of, [W, D]; None: all. The last block stores keys and values of all
        rows, and computes only these W after its attention: nothing where W is 0.
        """
        h = self.embed(ids)
        last = len(self.blk) - 1
        for layer in range(last):
            h = self.layer(layer, h, cache)
        return self.layer(last, h, cache, wanted)

    def layer(self, layer: int, h: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """One block: hidden states [T, D] -> [T, D], or after its attention only the rows in `wanted`, [W, D]."""
        block = self.blk[layer]
        with self._dense_span():
            if wanted is not None and not len(wanted):
                return block.attention(h, cache, wanted)
            if block.dense:
                return block.without_experts(h, cache, wanted)
            h, x, expert_ids, routing_weights = block.before_experts(h, cache, wanted)
        return h + self.experts(layer - self.config.leading_dense_block_count, x, expert_ids, routing_weights)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [T] -> hidden states before the first block, [T, D] float32."""
        h = self.token_embd[ids].float()
        return h if self.config.embedding_scale == 1.0 else h * self.config.embedding_scale

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V] float32."""
        x = self._norm(centred(h, self.config.architecture.norm), self.output_norm, self.config.rms_epsilon)
        logits = self._linear(x, self._output)
        return logits if self.config.logit_scale == 1.0 else logits / self.config.logit_scale


class Block:
    """One transformer block without its routed experts, which the caller computes."""

    def __init__(
        self,
        config: Config,
        index: int,
        weights: Mapping[str, Tensor],
        linear: Linear,
        router: Router,
        norm: Norm,
        make_heads: Heads,
    ) -> None:
        self.config, self.index = config, index
        self.dense = index not in config.sparse_layers
        """Whether it has one feed-forward in place of experts."""
        name, epsilon = partial(config.architecture.tensor_name, layer=index), config.rms_epsilon
        parts = config, index, weights, linear, norm
        self.attention = LatentAttention(*parts) if config.latent is not None else Attention(*parts, make_heads)
        self._linear, self._norm, self._router, self._epsilon = linear, norm, router, epsilon
        self._weights = RouterWeights(weights[name(Role.FFN_NORM)], weights[name(Role.FFN_NORM)])
        if self.dense:
            self._feed_forward = [name(role) for role in (Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN)]
            return
        biases = (weights[name(role)] if config.has(role) else None for role in (Role.SELECTION_BIAS, Role.ROUTER_BIAS))
        self._weights = RouterWeights(weights[name(Role.FFN_NORM)], weights[name(Role.ROUTER)], *biases)
        self._shared: list[str] = []
        if config.has(Role.SHARED_GATE):
            self._shared = [name(role) for role in (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)]
        self._shared_router = weights[name(Role.SHARED_ROUTER)] if config.has(Role.SHARED_ROUTER) else None

    @property
    def norm_weight(self) -> Tensor | None:
        """The weight [D] of the RMS norm before the attention; None where h is centred first."""
        return None if self.config.architecture.norm is NormKind.LAYER else self.attention.norm_weight

    def before_experts(
        self, h: Tensor, cache: Cache, wanted: Tensor | None = None, normalised: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The dense half: h [T, D] -> h after attention and the shared experts, and the routed experts' input.

        That is x [T, D], expert_ids and routing_weights [T, K]. wanted: return only these rows; None: all. normalised:
        h after the norm by `norm_weight`, where the caller has it.
        """
        h, config = self.attention(h, cache, wanted, normalised), self.config
        x, expert_ids, routing_weights = self._router(
            self._centred(h), self._epsilon, self._weights, config.router, config.expert_used_count
        )
        if self._shared:
            y = self._linear.feed_forward(x, self._shared)
            if self._shared_router is not None:
                y *= torch.sigmoid(x @ self._shared_router)[:, None]
            h = h + self._scaled(y)
        return h, x, expert_ids, self._scaled(routing_weights)

    def without_experts(self, h: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """A dense layer: h [T, D] -> h after it, the rows in `wanted`; None: all."""
        h = self.attention(h, cache, wanted)
        x = self._norm(self._centred(h), self._weights.norm, self._epsilon)
        return h + self._scaled(self._linear.feed_forward(x, self._feed_forward))

    def _centred(self, h: Tensor) -> Tensor:
        return centred(h, self.config.architecture.norm)

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.config.residual_scale == 1.0 else y * self.config.residual_scale

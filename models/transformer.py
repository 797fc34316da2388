"""The forward pass of every declared architecture in torch, with GGUF's weight layout.

Knows shapes and the order of operations; not where experts run, how a linear layer multiplies, or how the KV cache
stores keys and values: these come as arguments. Attribute names are the tensor names in the file; `config.py`
explains the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from fiddler.errors import FileFormatError
from fiddler.models.architecture import Role, first_unknown
from fiddler.models.config import Config
from fiddler.models.interfaces import Cache, Experts, Linear, Norm, Router
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.router import rms_norm, route

__all__ = ["Block", "Transformer"]

_RUNS = (MIXTRAL,)  # architectures whose parts this file knows


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
    ) -> None:
        """weights: the tensors that `linear` does not multiply by: embeddings, norms and routers.

        dense_span: its context surrounds the dense half of each block: all but the experts.
        Raises FileFormatError for an architecture with a part that does not run.
        """
        unknown = first_unknown(config.architecture, _RUNS)
        if unknown is not None:
            raise FileFormatError(f"{config.architecture.name} has {unknown}, which does not run")
        name = config.architecture.tensor_name
        self.config = config
        self.token_embd = weights[name(Role.TOKEN_EMBEDDING)]  # [V, D]
        self.blk = [Block(config, index, weights, linear, router, norm) for index in range(config.block_count)]
        self.output_norm, self._output = weights[name(Role.OUTPUT_NORM)], name(Role.OUTPUT)
        self._linear, self._norm, self._dense_span = linear, norm, dense_span
        self.experts = experts

    def __call__(self, ids: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """One step: token ids [T], whose positions `cache` knows -> hidden states [T, D] float32.

        wanted: the W rows to return hidden states of, [W, D]; None: all. The last block stores keys and values of all
        rows, and computes only these W after its attention: nothing where W is 0.
        """
        h = self.token_embd[ids].float()
        for layer, block in enumerate(self.blk):
            last = layer == len(self.blk) - 1
            with self._dense_span():
                if last and wanted is not None and not len(wanted):
                    return block.attention(h, cache, wanted)
                h, x, expert_ids, routing_weights = block.before_experts(h, cache, wanted if last else None)
            h = h + self.experts(layer, x, expert_ids, routing_weights)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V] float32."""
        return self._linear(self._norm(h, self.output_norm, self.config.rms_epsilon), self._output)


class Block:
    """One transformer block without its experts, which the caller computes."""

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
        name = partial(config.architecture.tensor_name, layer=index)
        self.attn_norm = weights[name(Role.ATTENTION_NORM)]
        self.ffn_norm = weights[name(Role.FFN_NORM)]
        self.ffn_gate_inp = weights[name(Role.ROUTER)]  # [E, D]
        self._qkv = [name(role) for role in (Role.QUERY, Role.KEY, Role.VALUE)]
        self._attn_output = name(Role.ATTENTION_OUTPUT)
        self._linear, self._router, self._norm = linear, router, norm

    def before_experts(
        self, h: Tensor, cache: Cache, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The dense half: h [T, D] -> h after attention, expert input x [T, D], expert_ids, routing_weights [T, K].

        wanted: return only these rows; None: all.
        """
        h = self.attention(h, cache, wanted)
        k = self.config.expert_used_count
        return h, *self._router(h, self.ffn_norm, self.config.rms_epsilon, self.ffn_gate_inp, k)

    def attention(self, h: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """h [T, D] + attention of the normalised h: the rows in `wanted`, [W, D]. Stores keys and values of all."""
        x = self._norm(h, self.attn_norm, self.config.rms_epsilon)
        qkv = self._linear.together(x, self._qkv)
        q, k, v = (tensor.view(len(x), -1, self.config.head_dim) for tensor in qkv)  # [T, H or G, head_dim]
        attended = cache.attend(self.index, q, k, v).flatten(1)
        if wanted is not None:
            h, attended = h[wanted], attended[wanted]
            if not len(wanted):
                return h
        return self._linear(attended, self._attn_output, h)

"""Mixtral's forward pass (Jiang et al. 2024, https://arxiv.org/abs/2401.04088) with GGUF's weight layout.

Knows shapes and the order of operations; not where experts run, how a linear layer multiplies, or how the KV cache
stores keys and values: these come as arguments. Attribute names are the tensor names in the file; `config.py`
explains the letters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fiddler.models.config import Config
from fiddler.models.interfaces import Cache, Experts, Linear, Norm, Router
from fiddler.models.router import rms_norm, route

__all__ = ["Block", "Mixtral"]


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
        """weights: the tensors that `linear` does not multiply by: embeddings, norms and routers."""
        self.config = config
        self.token_embd = weights["token_embd.weight"]  # [V, D]
        self.blk = [Block(config, index, weights, linear, router, norm) for index in range(config.block_count)]
        self.output_norm = weights["output_norm.weight"]
        self._linear, self._norm = linear, norm
        self.experts = experts

    def __call__(self, ids: Tensor, cache: Cache, wanted: Tensor | None = None) -> Tensor:
        """One step: token ids [T], whose positions `cache` knows -> hidden states [T, D] float32.

        wanted: the W rows to return hidden states of, [W, D]; None: all. The last block stores keys and values of all
        rows, and computes only these W after its attention: nothing where W is 0.
        """
        h = self.token_embd[ids].float()
        for layer, block in enumerate(self.blk):
            last = layer == len(self.blk) - 1
            if last and wanted is not None and not len(wanted):
                return block.attention(h, cache, wanted)
            h, x, expert_ids, routing_weights = block.before_experts(h, cache, wanted if last else None)
            h = h + self.experts(layer, x, expert_ids, routing_weights)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V] float32."""
        return self._linear(self._norm(h, self.output_norm, self.config.rms_epsilon), "output.weight")


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
        self.attn_norm = weights[f"blk.{index}.attn_norm.weight"]
        self.ffn_norm = weights[f"blk.{index}.ffn_norm.weight"]
        self.ffn_gate_inp = weights[f"blk.{index}.ffn_gate_inp.weight"]  # [E, D]
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
        prefix = f"blk.{self.index}."
        x = self._norm(h, self.attn_norm, self.config.rms_epsilon)
        qkv = self._linear.together(x, [f"{prefix}attn_{part}.weight" for part in "qkv"])
        q, k, v = (tensor.view(len(x), -1, self.config.head_dim) for tensor in qkv)  # [T, H or G, head_dim]
        attended = cache.attend(self.index, q, k, v).flatten(1)
        if wanted is not None:
            h, attended = h[wanted], attended[wanted]
            if not len(wanted):
                return h
        return self._linear(attended, prefix + "attn_output.weight", h)

"""The training pass of a demo model: transformers' mathematics, written for speed. Knows no data and no optimizer.

The weights live in transformers' `MixtralForCausalLM` or `Qwen3MoeForCausalLM`. All experts are computed for all tokens
as three large products, and the router's weights, zero for the experts that a token does not go to, scale the hidden
units in between. For models this small that is faster than gathering, compiled and with bf16 products: on a GPU, and
on a CPU with AMX (32 experts of width 32: 0.7 of the time of a product an expert). `compare` holds the two passes
against each other.

Letters: N sequences, S positions, D width, H heads, G KV heads, C head size, E experts, K experts a token,
F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attention:
    """What a layer's weights do not tell."""

    heads: int
    kv_heads: int
    top: int  # K
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last axis, in float32."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's order. x [N, heads, S, C], turn [2, S, C/2]; float32."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = turn.unbind(0)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def block(
    x: Tensor, turn: Tensor, shape: Attention, dtype: torch.dtype, weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """One layer on x [N, S, D] -> x, and the load-balancing loss of its router.

    That loss is E times the sum over experts of (share of the tokens sent there) times (mean probability): K
    where all is even, with K assignments a token. The share has no gradient. (Fedus et al. 2021, equation 4,
    for each layer by itself.)
    """
    n, s, d = x.shape
    heads, kv_heads, eps = shape.heads, shape.kv_heads, shape.eps
    w = {name: weight.to(dtype) for name, weight in weights.items() if weight.dim() > 1}
    y = rms_norm(x, weights["input_layernorm.weight"], eps).to(dtype)
    q = F.linear(y, w["self_attn.q_proj.weight"]).view(n, s, heads, -1).transpose(1, 2)
    k = F.linear(y, w["self_attn.k_proj.weight"]).view(n, s, kv_heads, -1).transpose(1, 2)
    v = F.linear(y, w["self_attn.v_proj.weight"]).view(n, s, kv_heads, -1).transpose(1, 2)
    if "self_attn.q_norm.weight" in weights:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], eps)
    groups = heads // kv_heads
    k, v = rotate(k, turn).to(dtype).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(rotate(q, turn).to(dtype), k, v, is_causal=True)
    x = x + F.linear(y.transpose(1, 2).reshape(n, s, -1), w["self_attn.o_proj.weight"])

    normed = rms_norm(x, weights["post_attention_layernorm.weight"], eps).view(-1, d)  # [T, D]
    odds = F.linear(normed, weights["mlp.gate.weight"]).softmax(-1)  # [T, E], float32
    best, chosen = odds.topk(shape.top, -1)
    share = torch.zeros_like(odds).scatter(1, chosen, best / best.sum(-1, keepdim=True))
    sent = (share.detach() > 0).float().mean(0)
    balance = odds.shape[1] * (sent * odds.mean(0)).sum()

    up_down = w["mlp.experts.gate_up_proj"]  # [E, 2 F, D], gate rows first
    experts, width = up_down.shape[0], up_down.shape[1] // 2
    gate, up = F.linear(normed.to(dtype), up_down.flatten(0, 1)).view(-1, experts, 2, width).unbind(2)
    hidden = F.silu(gate) * up * share.to(dtype).unsqueeze(-1)  # [T, E, F]
    down = w["mlp.experts.down_proj"].transpose(0, 1).reshape(d, experts * width)  # [E, D, F] -> [D, E F]
    return x + F.linear(hidden.flatten(1), down).view(n, s, d), balance


def head_loss(x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy in nats of the next tokens, x [N, S, D], targets [N, S]."""
    logits = F.linear(rms_norm(x, norm, eps).to(dtype), weight.to(dtype))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Forward:
    """The training pass over a model's own parameters."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, compiled: bool) -> None:
        """dtype: of the products."""
        self.model, self.dtype = model, dtype
        self.block = torch.compile(block, dynamic=False) if compiled else block
        self.head_loss = torch.compile(head_loss, dynamic=False) if compiled else head_loss
        self.layers = [dict(layer.named_parameters()) for layer in model.model.layers]
        c = model.config
        self.shape = Attention(c.num_attention_heads, c.num_key_value_heads, c.num_experts_per_tok, c.rms_norm_eps)
        steps = torch.arange(0, c.head_dim, 2, device=model.device).float() / c.head_dim
        rates = c.rope_parameters["rope_theta"] ** -steps
        angles = torch.arange(c.max_position_embeddings, device=model.device).float()[:, None] * rates
        self.turn = torch.stack((angles.cos(), angles.sin()))  # [2, context, C/2]

    def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats a token) and load-balancing loss (mean over layers); ids and targets [N, S]."""
        model, turn = self.model, self.turn[:, : ids.shape[1]]
        x = F.embedding(ids, model.model.embed_tokens.weight)
        balances = []
        for weights in self.layers:
            x, balance = self.block(x, turn, self.shape, self.dtype, weights)
            balances.append(balance)
        norm, head = model.model.norm.weight, model.lm_head.weight
        return self.head_loss(x, norm, head, targets, self.shape.eps, self.dtype), torch.stack(balances).mean()


@torch.no_grad()
def compare(model: PreTrainedModel, ids: Tensor) -> float:
    """Relative difference of our loss and transformers', both in float32. Should be rounding."""
    ours, _ = Forward(model, torch.float32, compiled=False).losses(ids[:, :-1], ids[:, 1:])
    theirs = F.cross_entropy(model(ids[:, :-1]).logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return (abs(ours - theirs) / theirs).item()

"""DeepSeek-MoE (v1), which transformers does not have: random checkpoints, and its forward pass written out in torch.

After the paper (https://arxiv.org/abs/2401.06066) and the names and keys of deepseek-ai/deepseek-moe-16b-base: first
layers dense, softmax over all experts, top-K without division by their sum, and shared experts as one feed-forward.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from oracles.flipped_experts import RouterStep
from oracles.reference import TINY

__all__ = ["DeepSeekReference", "DeepSeekShape", "make_deepseek_checkpoint"]


@dataclass(frozen=True)
class DeepSeekShape:
    D: int = 64
    heads: int = 4
    kv_heads: int = 4
    layers: int = 3
    dense_layers: int = 1
    dense_width: int = 88
    experts: int = 8
    used: int = 3
    width: int = 40
    shared: int = 2
    theta: float = 1e4
    renormalise: bool = False
    dtype: torch.dtype = torch.bfloat16


def make_deepseek_checkpoint(shape: DeepSeekShape, folder: Path) -> Path:
    """Save a random model and the tokenizer of tests/data/tiny; return the folder."""
    config = {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "vocab_size": 512,
        "hidden_size": shape.D,
        "intermediate_size": shape.dense_width,
        "moe_intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "n_shared_experts": shape.shared,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.used,
        "moe_layer_freq": 1,
        "first_k_dense_replace": shape.dense_layers,
        "norm_topk_prob": shape.renormalise,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(hash((shape.D, shape.layers, shape.width)) & 0xFFFF)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)).to(shape.dtype)

    def norm() -> Tensor:
        return (torch.rand(shape.D, generator=generator) + 0.5).to(shape.dtype)

    def feed_forward(prefix: str, width: int) -> dict[str, Tensor]:
        return {
            f"{prefix}.gate_proj.weight": matrix(width, shape.D),
            f"{prefix}.up_proj.weight": matrix(width, shape.D),
            f"{prefix}.down_proj.weight": matrix(shape.D, width),
        }

    tensors = {"model.embed_tokens.weight": matrix(512, shape.D, 8.0), "model.norm.weight": norm()}
    tensors["lm_head.weight"] = matrix(512, shape.D)
    kv_width = shape.D // shape.heads * shape.kv_heads
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = norm()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
        for name, rows in (("q", shape.D), ("k", kv_width), ("v", kv_width), ("o", shape.D)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, shape.D)
        if layer < shape.dense_layers:
            tensors |= feed_forward(f"{prefix}.mlp", shape.dense_width)
            continue
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(shape.experts, shape.D, 2.0)
        tensors |= feed_forward(f"{prefix}.mlp.shared_experts", shape.width * shape.shared)
        for expert in range(shape.experts):
            tensors |= feed_forward(f"{prefix}.mlp.experts.{expert}", shape.width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


class DeepSeekReference:
    """The forward pass in float32 over a folder's weights, one head and one expert after the other."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        self._weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.routers: list[RouterStep] = []
        """Of the last call, layer by layer."""

    def __call__(self, ids: list[int]) -> Tensor:
        """Logits [T, V]."""
        config, w = self._config, self._weights
        self.routers = []
        h = w["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            h = h + self._attention(self._norm(h, f"{prefix}.input_layernorm.weight"), f"{prefix}.self_attn")
            x = self._norm(h, f"{prefix}.post_attention_layernorm.weight")
            if layer < config["first_k_dense_replace"]:
                h = h + self._feed_forward(x, f"{prefix}.mlp")
            else:
                h = h + self._experts(x, f"{prefix}.mlp")
        return self._norm(h, "model.norm.weight") @ w["lm_head.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        epsilon = self._config["rms_norm_eps"]
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * self._weights[name]

    def _feed_forward(self, x: Tensor, prefix: str) -> Tensor:
        gate, up, down = (self._weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        logits = x @ self._weights[f"{prefix}.gate.weight"].T
        used = self._config["num_experts_per_tok"]
        self.routers.append(RouterStep(logits, lambda changed: torch.topk(changed, used).indices))
        scores = torch.softmax(logits, -1)
        y = self._feed_forward(x, f"{prefix}.shared_experts")
        for token, row in enumerate(scores):
            chosen = sorted(range(len(row)), key=lambda expert: -float(row[expert]))
            chosen = chosen[:used]
            total = float(row[chosen].sum()) if self._config["norm_topk_prob"] else 1.0
            for expert in chosen:
                y[token] += row[expert] / total * self._feed_forward(x[token], f"{prefix}.experts.{expert}")
        return y

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        heads, kv_heads = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        q, k, v = (x @ self._weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
        head_dim, out = x.shape[1] // heads, []
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        for head in range(heads):
            group = head * kv_heads // heads
            own, shared = slice(head * head_dim, (head + 1) * head_dim), slice(group * head_dim, (group + 1) * head_dim)
            scores = self._rotate(q[:, own]) @ self._rotate(k[:, shared]).T / math.sqrt(head_dim)
            out.append(torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ v[:, shared])
        return torch.cat(out, -1) @ self._weights[f"{prefix}.o_proj.weight"].T

    def _rotate(self, x: Tensor) -> Tensor:
        """RoPE by halves, x [T, head_dim]."""
        half = x.shape[1] // 2
        angles = torch.arange(len(x))[:, None] / self._config["rope_theta"] ** (torch.arange(half) / half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

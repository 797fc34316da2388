"""Random checkpoints of every family that converts, and transformers' own forward pass over them."""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from oracles.flipped_experts import RouterStep
from oracles.reference import TINY

__all__ = ["CASES", "Case", "FamilyReference", "make_family_checkpoint"]

_SIZES = {
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A class of transformers and its configuration; how its checkpoint is stored."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    fused: bool = False
    shard: str = "1GB"


def _heads(width: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


_QWEN3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
_QWEN2 = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
_OLMOE = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40}
_GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "intermediate_size": 88,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "routed_scaling_factor": 1.5,
}

_LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "intermediate_size": 88,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
_DENSE = {"intermediate_size": 88}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}


def _dbrx(width: int, heads: int, kv_heads: int, clip: float, theta: float = 1e4, **ffn: object) -> dict[str, Any]:
    attention = {"kv_n_heads": kv_heads, "clip_qkv": clip, "rope_theta": theta}  # transformers 5.24 demands all three,
    return {
        "d_model": width,
        "n_heads": heads,
        "attn_config": attention,
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 3, "ffn_hidden_size": 40, **ffn},
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # and computes with this base
    }


CASES = {
    "qwen3moe": Case("Qwen3Moe", {**_heads(64, 8, 2), **_QWEN3, "head_dim": 16}),
    "qwen3moe, odd, tied, 3 shards": Case(
        "Qwen3Moe", {**_heads(50, 3, 3), **_QWEN3, "head_dim": 22, "tie_word_embeddings": True}, shard="250KB"
    ),
    "qwen3moe, f16, fused, not renormalised": Case(
        "Qwen3Moe", {**_heads(72, 4, 2), **_QWEN3, "head_dim": 24, "norm_topk_prob": False}, dtype="f16", fused=True
    ),
    "qwen2moe": Case("Qwen2Moe", {**_heads(64, 8, 2), **_QWEN2}),
    "qwen2moe, odd, tied, 3 shards": Case(
        "Qwen2Moe", {**_heads(66, 3, 3), **_QWEN2, "norm_topk_prob": True, "tie_word_embeddings": True}, shard="250KB"
    ),
    "qwen2moe, f16, fused": Case("Qwen2Moe", {**_heads(72, 6, 3), **_QWEN2}, dtype="f16", fused=True),
    "olmoe": Case("Olmoe", {**_heads(64, 4, 4), **_OLMOE}),
    "olmoe, GQA, clipped, 3 shards": Case(
        "Olmoe", {**_heads(66, 3, 1), **_OLMOE, "clip_qkv": 0.7, "rope_parameters": {"rope_theta": 5e3}}, shard="250KB"
    ),
    "olmoe, f16, fused, tied": Case(
        "Olmoe", {**_heads(72, 6, 6), **_OLMOE, "tie_word_embeddings": True}, dtype="f16", fused=True
    ),
    "granitemoe": Case("GraniteMoe", {**_heads(64, 8, 2), **_GRANITE}),
    "granitemoe, tied, 3 shards": Case(
        "GraniteMoe", {**_heads(66, 3, 3), **_GRANITE, "tie_word_embeddings": True}, shard="250KB"
    ),
    "granitemoe, shared, f16": Case(
        "GraniteMoeShared", {**_heads(72, 6, 3), **_GRANITE, "shared_intermediate_size": 56}, dtype="f16"
    ),
    "granitemoe, shared, fused": Case(
        "GraniteMoeShared", {**_heads(64, 4, 4), **_GRANITE, "shared_intermediate_size": 48}, fused=True
    ),
    "glm4moe": Case("Glm4Moe", {**_heads(64, 8, 2), **_GLM, "use_qk_norm": True, "attention_bias": True}),
    "glm4moe, 2 dense layers, groups, tied, 3 shards": Case(
        "Glm4Moe",
        {
            **_heads(50, 3, 3),
            **_GLM,
            "head_dim": 24,
            "first_k_dense_replace": 2,
            "n_group": 4,
            "topk_group": 2,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
        shard="250KB",
    ),
    "glm4moe, f16, fused, biases": Case(
        "Glm4Moe", {**_heads(72, 4, 2), **_GLM, "attention_bias": True, "n_shared_experts": 2}, dtype="f16", fused=True
    ),
    "dbrx": Case("Dbrx", _dbrx(64, 8, 2, clip=0.9, theta=5e5)),
    "dbrx, odd, 3 shards": Case("Dbrx", _dbrx(66, 3, 3, clip=2, moe_top_k=1), shard="250KB"),
    "dbrx, f16, not renormalised": Case(
        "Dbrx", _dbrx(72, 6, 1, clip=0.4, moe_normalize_expert_weights=None), dtype="f16"
    ),
    "deepseek2, V2-Lite": Case("DeepseekV2", {**_heads(64, 4, 4), **_LATENT}),
    "deepseek2, V2, groups, YaRN with mscale, 3 shards": Case(
        "DeepseekV2",
        {
            **_heads(66, 3, 3),
            **_LATENT,
            "q_lora_rank": 20,
            "kv_lora_rank": 26,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        shard="250KB",
    ),
    "deepseek2, V2, f16, fused, tied": Case(
        "DeepseekV2",
        {
            **_heads(72, 6, 6),
            **_LATENT,
            "q_lora_rank": 30,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
            "tie_word_embeddings": True,
        },
        dtype="f16",
        fused=True,
    ),
    "deepseek2, V3": Case("DeepseekV3", {**_heads(64, 4, 4), **_LATENT, "n_group": 2, "topk_group": 1}),
    "deepseek2, V3, groups, YaRN, 3 shards, tied": Case(
        "DeepseekV3",
        {
            **_heads(50, 5, 5),
            **_LATENT,
            "q_lora_rank": 20,
            "v_head_dim": 22,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "tie_word_embeddings": True,
        },
        shard="250KB",
    ),
    "deepseek2, V3, f16, fused, not renormalised": Case(
        "DeepseekV3",
        {
            **_heads(72, 6, 6),
            **_LATENT,
            "q_lora_rank": 36,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": {**_YARN, "truncate": False},
        },
        dtype="f16",
        fused=True,
    ),
    "llama, tied, RoPE of Llama 3.1": Case(
        "Llama", {**_heads(64, 8, 2), **_DENSE, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}
    ),
    "mistral, window": Case("Mistral", {**_heads(64, 8, 2), **_DENSE, "sliding_window": 16}),
    "llama, odd, f16, 2 shards, linear RoPE": Case(
        "Llama",
        {**_heads(50, 5, 5), "intermediate_size": 77, "head_dim": 14, "rope_parameters": _LINEAR},
        dtype="f16",
        shard="150KB",
    ),
    "mistral, YaRN": Case(
        "Mistral", {**_heads(66, 3, 1), **_DENSE, "sliding_window": None, "rope_parameters": _YARN}, shard="250KB"
    ),
    "mixtral, YaRN": Case("Mixtral", {**_heads(64, 4, 2), **_MIXTRAL, "head_dim": 16, "rope_parameters": _YARN}),
    "mixtral, linear RoPE": Case("Mixtral", {**_heads(64, 4, 2), **_MIXTRAL, "rope_parameters": _LINEAR}),
    "mixtral, RoPE of Llama 3.1": Case("Mixtral", {**_heads(64, 2, 2), **_MIXTRAL, "rope_parameters": _LLAMA3}),
    "qwen3moe, YaRN": Case(
        "Qwen3Moe",
        {**_heads(64, 4, 2), **_QWEN3, "head_dim": 22, "rope_parameters": {**_YARN, "attention_factor": 1.3}},
    ),
    "qwen3moe, linear RoPE": Case(
        "Qwen3Moe", {**_heads(64, 4, 2), **_QWEN3, "head_dim": 16, "rope_parameters": _LINEAR}
    ),
    "qwen3moe, RoPE of Llama 3.1": Case(
        "Qwen3Moe", {**_heads(64, 4, 2), **_QWEN3, "head_dim": 32, "rope_parameters": _LLAMA3}
    ),
    "glm4moe, YaRN": Case(
        "Glm4Moe",
        {
            **_heads(64, 4, 2),
            **_GLM,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "partial_rotary_factor": 0.5},
        },
    ),
}


def make_family_checkpoint(case: Case, folder: Path) -> Path:
    """Save a random model of transformers and the tokenizer of tests/data/tiny; return the folder.

    Weights are large enough that every part matters, as in `reference.make_checkpoint`. A scale of the routed experts
    divides their last matrices: trained ones add as much as attention does with it, not without it.
    """
    config = getattr(transformers, f"{case.kind}Config")(**_SIZES, **case.options)
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.2)
            elif tensor.dim() == 1 and name.endswith("bias"):
                tensor.normal_(0.0, 0.3)
            elif tensor.dim() > 1:
                gain = 2.0 if ".gate." in name or ".router." in name else 1.0
                if name.endswith(".experts.down_proj"):
                    gain /= getattr(config, "routed_scaling_factor", None) or 1.0
                tensor.normal_(0.0, gain / tensor.shape[-1] ** 0.5)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float16
    model.to(dtype).save_pretrained(folder, max_shard_size=case.shard, save_original_format=not case.fused)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


class FamilyReference:
    """transformers' own forward pass in float32 over the 16-bit weights of a folder."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
            ).eval()
        self.routers: list[RouterStep] = []
        """Of the last call, layer by layer."""
        for name, module in self.model.named_modules():
            if name.endswith(".ffn.router"):  # DBRX
                rule = self.model.get_submodule(name.removesuffix(".router")).route_tokens_to_experts
                module.register_forward_hook(partial(self._add_router_of_logits, rule))
            elif name.endswith((".mlp.gate", ".router")):
                module.register_forward_hook(self._add_router)

    def __call__(self, ids: list[int]) -> Tensor:
        """Logits [T, V]."""
        self.routers = []
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def _add_router_of_logits(self, rule: Callable[[Tensor], Any], module: Any, inputs: Any, logits: Tensor) -> None:
        self.routers.append(RouterStep(logits, lambda changed: rule(changed)[1]))

    def _add_router(self, module: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, logits = inputs[0].reshape(-1, inputs[0].shape[-1]), outputs[0]

        def choose(changed: Tensor) -> Tensor:
            """The module's own choice for an input whose product with its matrix is `changed`."""
            chosen: Tensor = module.forward(x + (changed - logits) @ torch.linalg.pinv(module.weight).T)[2]
            return chosen

        self.routers.append(RouterStep(logits, choose, getattr(module, "num_group", None) or 1))

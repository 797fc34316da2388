"""The demo models: everything that decides one, apart from the text and the time. Knows no training."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig


@dataclass(frozen=True)
class Recipe:
    """One demo model and how it is trained.

    family: "mixtral", or "qwen3moe", which normalises each head of q and k. tokenizer: "sentencepiece" or "byte-level".
    """

    family: str
    tokenizer: str
    vocabulary: int
    bos: int
    eos: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    experts_per_token: int
    expert_width: int
    tied: bool  # whether the embedding is the output's matrix too
    context: int
    sequences: int  # a step, all processes together
    peak_rate: float
    warm_up: int  # steps
    balance: float  # weight of the load-balancing loss
    width: int = 256
    decay: float = 0.1

    def config(self) -> PreTrainedConfig:
        """The architecture as transformers has it."""
        shape = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "num_experts_per_tok": self.experts_per_token,
            "max_position_embeddings": self.context,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "router_aux_loss_coef": self.balance,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "tie_word_embeddings": self.tied,
        }
        if self.family == "mixtral":
            return MixtralConfig(num_local_experts=self.experts, **shape)
        return Qwen3MoeConfig(
            num_experts=self.experts, moe_intermediate_size=self.expert_width, norm_topk_prob=True, **shape
        )


RECIPES = {
    "stories-18m": Recipe(
        family="mixtral",
        tokenizer="sentencepiece",
        vocabulary=4096,
        bos=1,
        eos=2,
        layers=8,
        heads=8,
        kv_heads=4,
        head_size=32,
        experts=8,
        experts_per_token=2,
        expert_width=288,
        tied=False,
        context=1024,
        sequences=64,
        peak_rate=2.5e-3,
        warm_up=200,
        balance=0.01,
    ),
    "stories-3m": Recipe(
        family="qwen3moe",
        tokenizer="byte-level",
        vocabulary=1792,
        bos=0,
        eos=1,
        layers=3,
        heads=4,
        kv_heads=2,
        head_size=64,
        experts=32,
        experts_per_token=4,
        expert_width=32,
        tied=True,
        context=512,
        sequences=8,
        peak_rate=2e-3,
        warm_up=100,
        balance=0.003,
    ),
}
"""By the name of the GGUF file."""

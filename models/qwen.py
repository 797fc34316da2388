"""Qwen's and OLMoE's mixtures of experts: rows of the table of architectures.

Qwen3-MoE (https://arxiv.org/abs/2505.09388), Qwen2-MoE (https://arxiv.org/abs/2407.10671) and OLMoE (Muennighoff et al.
2024, https://arxiv.org/abs/2409.02060). They rotate halves, and differ in what they normalise and share.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import (
    AttentionBias,
    QkNorm,
    Rotary,
    RouterRule,
    SharedExperts,
    Window,
)
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import ATTENTION, BIASES, EXPERTS, HEAD_NORMS, SHARED, SHARED_ROUTER, VECTOR_NORMS

__all__ = ["OLMOE", "QWEN2_MOE", "QWEN3_MOE"]

QWEN3_MOE = replace(
    MIXTRAL,
    name="Qwen3-MoE",
    gguf_name="qwen3moe",
    qk_norm=QkNorm.HEAD,
    window=Window.NONE,
    rotary=Rotary.HALVES,
    block=(*ATTENTION, *HEAD_NORMS, *EXPERTS),
)

QWEN2_MOE = replace(
    MIXTRAL,
    name="Qwen2-MoE",
    gguf_name="qwen2moe",
    attention_bias=AttentionBias.QUERY_KEY_VALUE,
    window=Window.NONE,
    rotary=Rotary.HALVES,
    router=RouterRule(renormalise=False),
    shared_experts=SharedExperts.GATED,
    block=(*ATTENTION, *BIASES, *EXPERTS, *SHARED, *SHARED_ROUTER),
    may_tie=False,
)

OLMOE = replace(
    MIXTRAL,
    name="OLMoE",
    gguf_name="olmoe",
    qk_norm=QkNorm.VECTOR,
    window=Window.NONE,
    rotary=Rotary.HALVES,
    router=RouterRule(renormalise=False),
    block=(*ATTENTION, *VECTOR_NORMS, *EXPERTS),
    may_tie=False,
)

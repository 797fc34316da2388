"""DeepSeek's mixtures of experts, and GLM-4.5 (https://arxiv.org/abs/2508.06471).

DeepSeek-MoE (Dai et al. 2024, https://arxiv.org/abs/2401.06066), and DeepSeek-V2 and V3 in one row
(https://arxiv.org/abs/2405.04434, https://arxiv.org/abs/2412.19437), whose attention is latent. The
first layers are dense, and shared experts are one feed-forward of their joint width.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import (
    AttentionBias,
    AttentionKind,
    DenseLayers,
    Layers,
    ModelTensor,
    QkNorm,
    Role,
    Rotary,
    RouterRule,
    Scoring,
    SharedExperts,
    Window,
)
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import ATTENTION, BIASES, DENSE, EXPERTS, HEAD_NORMS, LATENT_ATTENTION, SHARED

__all__ = ["DEEPSEEK", "DEEPSEEK2", "GLM4_MOE"]

DEEPSEEK = replace(
    MIXTRAL,
    name="DeepSeek-MoE",
    gguf_name="deepseek",
    window=Window.NONE,
    router=RouterRule(renormalise=False),
    shared_experts=SharedExperts.ADDED,
    dense_layers=DenseLayers.LEADING,
    block=(*ATTENTION, *DENSE, *EXPERTS, *SHARED),
)

_SELECTION_BIAS = ModelTensor(Role.SELECTION_BIAS, "exp_probs_b.bias", ("E",), Layers.SPARSE)

DEEPSEEK2 = replace(
    DEEPSEEK,
    name="DeepSeek-V2 or V3",
    gguf_name="deepseek2",
    attention=AttentionKind.LATENT,
    block=(
        *LATENT_ATTENTION,
        *DENSE,
        *EXPERTS,
        replace(_SELECTION_BIAS, optional=True),
        *(replace(tensor, optional=True) for tensor in SHARED),
    ),
)

GLM4_MOE = replace(
    DEEPSEEK,
    name="GLM-4.5",
    gguf_name="glm4moe",
    qk_norm=QkNorm.HEAD,
    attention_bias=AttentionBias.QUERY_KEY_VALUE,
    rotary=Rotary.HALVES,
    router=RouterRule(Scoring.SIGMOID, renormalise=True),
    block=(
        *ATTENTION[:-1],
        ModelTensor(Role.FFN_NORM, "post_attention_norm.weight", ("D",)),
        *(replace(tensor, optional=True) for tensor in (*BIASES, *HEAD_NORMS)),
        *DENSE,
        *(*EXPERTS, _SELECTION_BIAS),
        *(replace(tensor, optional=True) for tensor in SHARED),
    ),
)

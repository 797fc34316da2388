"""gpt-oss in transformers' format: keys, defaults and tensor names. Knows names only.

Gate and up are one tensor of an expert, whose columns alternate. The published weights of experts are blocks of MXFP4.
"""

from __future__ import annotations

from fiddler.converters.family import COMMON, Family, StoredAs
from fiddler.models.architecture import Role
from fiddler.models.gpt_oss import GPT_OSS

__all__ = ["GPT_OSS_FAMILY"]

_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

GPT_OSS_FAMILY = Family(
    GPT_OSS,
    {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "sliding_window": 128,
    },
    expert_width="intermediate_size",
    experts=("num_local_experts", "num_experts"),
    epsilon=1e-5,
    theta=150000.0,
    rope={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    refused={"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    names={
        **COMMON,
        Role.OUTPUT_BIAS: (StoredAs("self_attn.o_proj.bias"),),
        Role.SINKS: (StoredAs("self_attn.sinks"),),
        Role.ROUTER: (StoredAs("mlp.router.weight"),),
        Role.ROUTER_BIAS: (StoredAs("mlp.router.bias"),),
        Role.GATE: (
            StoredAs(f"{_GATE_UP}_blocks", 0, alternating=True, packed=True),
            StoredAs(_GATE_UP, 0, transposed=True, alternating=True),
        ),
        Role.UP: (
            StoredAs(f"{_GATE_UP}_blocks", 1, alternating=True, packed=True),
            StoredAs(_GATE_UP, 1, transposed=True, alternating=True),
        ),
        Role.DOWN: (StoredAs(f"{_DOWN}_blocks", packed=True), StoredAs(_DOWN, transposed=True)),
        Role.GATE_BIAS: (StoredAs(f"{_GATE_UP}_bias", 0, alternating=True),),
        Role.UP_BIAS: (StoredAs(f"{_GATE_UP}_bias", 1, alternating=True),),
        Role.DOWN_BIAS: (StoredAs(f"{_DOWN}_bias"),),
    },
    quantised="mxfp4",
)

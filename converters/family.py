"""A family of models that convert, as a value: transformers' keys, defaults and tensor names. Knows names only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fiddler.models.architecture import Architecture, Role, Scoring

__all__ = ["COMMON", "EXPERTS", "OTHER_NAMES", "Family", "StoredAs", "expert_names"]


@dataclass(frozen=True)
class StoredAs:
    """A tensor's name in a layer of a checkpoint; with `{}`, one tensor for each expert.

    half: the tensor holds two of ours one after the other, in each expert; ours is the first (0) or the second (1).
    flat: the experts' matrices are one below the other in one matrix. transposed: each has rows and columns exchanged.
    alternating: the two are every second column as stored, or row of packed ones. packed: blocks of MXFP4, whose scales
    are another tensor, `_scales` in place of `_blocks`.
    """

    name: str
    half: int | None = None
    flat: bool = False
    transposed: bool = False
    alternating: bool = False
    packed: bool = False


OTHER_NAMES: Mapping[Role, str] = {
    Role.TOKEN_EMBEDDING: "model.embed_tokens.weight",
    Role.OUTPUT_NORM: "model.norm.weight",
    Role.OUTPUT: "lm_head.weight",
}
"""Outside of the layers."""

COMMON: Mapping[Role, tuple[StoredAs, ...]] = {
    role: (StoredAs(name),)
    for role, name in {
        Role.ATTENTION_NORM: "input_layernorm.weight",
        Role.QUERY: "self_attn.q_proj.weight",
        Role.KEY: "self_attn.k_proj.weight",
        Role.VALUE: "self_attn.v_proj.weight",
        Role.QUERY_BIAS: "self_attn.q_proj.bias",
        Role.KEY_BIAS: "self_attn.k_proj.bias",
        Role.VALUE_BIAS: "self_attn.v_proj.bias",
        Role.QUERY_NORM: "self_attn.q_norm.weight",
        Role.KEY_NORM: "self_attn.k_norm.weight",
        Role.QUERY_DOWN: "self_attn.q_a_proj.weight",
        Role.QUERY_DOWN_NORM: "self_attn.q_a_layernorm.weight",
        Role.QUERY_UP: "self_attn.q_b_proj.weight",
        Role.LATENT: "self_attn.kv_a_proj_with_mqa.weight",
        Role.LATENT_NORM: "self_attn.kv_a_layernorm.weight",
        Role.KEY_UP: "self_attn.kv_b_proj.weight",  # of each head, the key's rows before the value's
        Role.VALUE_UP: "self_attn.kv_b_proj.weight",
        Role.ATTENTION_OUTPUT: "self_attn.o_proj.weight",
        Role.FFN_NORM: "post_attention_layernorm.weight",
        Role.ROUTER: "mlp.gate.weight",
        Role.SELECTION_BIAS: "mlp.gate.e_score_correction_bias",
        Role.SHARED_ROUTER: "mlp.shared_expert_gate.weight",
        Role.SHARED_GATE: "mlp.shared_experts.gate_proj.weight",
        Role.SHARED_UP: "mlp.shared_experts.up_proj.weight",
        Role.SHARED_DOWN: "mlp.shared_experts.down_proj.weight",
        Role.DENSE_GATE: "mlp.gate_proj.weight",
        Role.DENSE_UP: "mlp.up_proj.weight",
        Role.DENSE_DOWN: "mlp.down_proj.weight",
    }.items()
}
"""As most families name them."""


def expert_names(single: Mapping[Role, str], *stacked: tuple[str, str]) -> dict[Role, tuple[StoredAs, ...]]:
    """Names of the expert stacks: one tensor an expert first; or gate and up in one stack, down in another."""
    found = {role: [StoredAs(name)] if name else [] for role, name in single.items()}
    for gate_up, down in stacked:
        found[Role.GATE].append(StoredAs(gate_up, 0))
        found[Role.UP].append(StoredAs(gate_up, 1))
        found[Role.DOWN].append(StoredAs(down))
    return {role: tuple(names) for role, names in found.items()}


EXPERTS = expert_names(
    {
        Role.GATE: "mlp.experts.{}.gate_proj.weight",
        Role.UP: "mlp.experts.{}.up_proj.weight",
        Role.DOWN: "mlp.experts.{}.down_proj.weight",
    },
    ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # transformers 5 in memory
)


@dataclass(frozen=True)
class Family:
    """One `model_type`: its architecture, its keys in config.json where families differ, and its tensor names.

    Where a role has several names, a layer's first tensor tells which it is.
    """

    architecture: Architecture
    defaults: Mapping[str, int]  # of absent integer keys
    keys: Mapping[str, str] = field(default_factory=dict)  # its own names of keys; `a.b`: key b of the object a
    scoring: Scoring | None = None  # where it is not the architecture's
    scale: float = 1.0  # of routing weights, if no key has one
    expert_width: str = "moe_intermediate_size"
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")  # the second as transformers 5 saves it
    windowed: bool = True  # whether `sliding_window` means something, where the architecture has windows
    epsilon: float = 1e-6
    theta: float = 1e4  # of RoPE, if no key has a base
    rope: Mapping[str, object] = field(default_factory=dict)  # RoPE's object, if there is none
    theta_keys: tuple[str, ...] = ("rope_theta",)  # beside RoPE's own objects
    partial_rotary: float = 1.0  # the part of a head that is rotated, if no key says it
    shared_width: str | None = None  # of all shared experts together; None: their number times an expert's width
    clamp: str | None = None  # the limit of queries, keys and values
    switches: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)  # false or absent: no tensors in these roles
    refused: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # other values than these of these keys
    names: Mapping[Role, tuple[StoredAs, ...]] = field(default_factory=lambda: {**COMMON, **EXPERTS})
    quantised: str | None = None  # `quant_method` of weights that convert
    layers: str = "model.layers"  # what the names of a layer's tensors begin with, before its number
    other_names: Mapping[Role, str] = field(default_factory=lambda: OTHER_NAMES)

"""An architecture as a value: the parts of its blocks and the tensors that they have. Declares; computes nothing.

A row of the table in `fiddler.models`. `transformer.py` runs every one; the compiled decode step says with
`first_unknown` whether it knows its parts, and is skipped otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from enum import Enum, StrEnum, auto

__all__ = [
    "EXPERTS",
    "EXPERT_BIASES",
    "FLOATS",
    "ROPE_DIVISORS",
    "Activation",
    "Architecture",
    "AttentionBias",
    "AttentionKind",
    "DenseLayers",
    "ExpertBias",
    "Layers",
    "ModelTensor",
    "Norm",
    "QkNorm",
    "Role",
    "Rotary",
    "RouterRule",
    "Scoring",
    "SharedExperts",
    "Sinks",
    "Window",
    "first_unknown",
]


class Norm(StrEnum):
    """Normalises the input of attention and of the experts."""

    RMS = "rms"  # Zhang and Sennrich 2019
    LAYER = "layer"  # Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450, without a bias

    @property
    def epsilon_key(self) -> str:
        """GGUF's key of its epsilon, less `attention.`."""
        return "layer_norm_rms_epsilon" if self is Norm.RMS else "layer_norm_epsilon"


class QkNorm(StrEnum):
    """RMS-normalises queries and keys before the rotary embedding."""

    NONE = "none"
    HEAD = "head"  # each head by itself, as in Qwen3-MoE
    VECTOR = "vector"  # all heads together, as in OLMoE


class AttentionBias(StrEnum):
    """Biases of attention's products."""

    NONE = "none"
    QUERY_KEY_VALUE = "of queries, keys and values"
    ALL = "of queries, keys, values and the output"


class Window(StrEnum):
    """Layers that attend to the last `Config.sliding_window` positions only, where it is set."""

    NONE = "none"
    EVERY_LAYER = "every layer"
    EVERY_SECOND = "every second layer"  # the first of each two


class Sinks(StrEnum):
    """Terms of attention's softmax that belong to no position: https://arxiv.org/abs/2309.17453."""

    NONE = "none"
    HEAD = "a logit of each head"


class Rotary(StrEnum):
    """Elements of a head that the rotary embedding rotates together."""

    NEIGHBOURS = "neighbours"  # 2 i and 2 i + 1; llama.cpp: ROPE_TYPE_NORM
    HALVES = "halves"  # i and i + half of what is rotated; llama.cpp: ROPE_TYPE_NEOX


class AttentionKind(StrEnum):
    """What attention's keys and values are, and what the KV cache holds of them."""

    HEADS = "of heads"
    LATENT = "of a latent"  # that all heads share: multi-head latent attention, as in DeepSeek-V2


class Scoring(StrEnum):
    """Turns a router's logits into scores, of which the largest are chosen."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class RouterRule:
    """How a token's experts and their routing weights follow from the router's logits.

    Scores; plus the selection bias, where the model has one; the best `groups_used` of `groups` equal groups of
    experts stay; the K largest are chosen; their scores without the bias, divided by their sum (`renormalise`) and
    multiplied by `scale`, are the routing weights. A group's rank is its largest score, or the sum of its two largest
    where there is a selection bias: DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and V3
    (https://arxiv.org/abs/2412.19437).
    """

    scoring: Scoring = Scoring.SOFTMAX
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1


class Activation(StrEnum):
    """How gate and up become an expert's hidden activations."""

    SILU = "silu"  # silu(gate) * up: Shazeer 2020, https://arxiv.org/abs/2002.05202
    CLAMPED = "clamped"  # g * sigmoid(1.702 g) * (u + 1), g = min(gate, 7), u = up between -7 and 7, as in gpt-oss


class ExpertBias(StrEnum):
    """Biases of the router's and the routed experts' products."""

    NONE = "none"
    ALL = "of the router, gate, up and down"


class SharedExperts(StrEnum):
    """Experts that every token uses, as one feed-forward of their joint width."""

    NONE = "none"
    ADDED = "added"  # DeepSeek
    GATED = "gated"  # times the sigmoid of a product of its own, as in Qwen2-MoE


class DenseLayers(StrEnum):
    """Layers with one feed-forward in place of experts."""

    NONE = "none"
    LEADING = "leading"  # the first `Config.leading_dense_block_count`
    EVERY = "every layer"  # no experts at all


class Layers(Enum):
    """The layers whose blocks have a tensor."""

    ALL = auto()
    SPARSE = auto()  # those with routed experts
    DENSE = auto()  # the others


class Role(Enum):
    """The use of a tensor; an architecture has at most one tensor of each in a block."""

    TOKEN_EMBEDDING = auto()
    ROPE_DIVISORS = auto()
    ATTENTION_NORM = auto()
    QUERY = auto()
    KEY = auto()
    VALUE = auto()
    QUERY_KEY_VALUE = auto()  # their rows in one matrix, in this order
    QUERY_BIAS = auto()
    KEY_BIAS = auto()
    VALUE_BIAS = auto()
    QUERY_NORM = auto()
    KEY_NORM = auto()
    QUERY_DOWN = auto()  # of latent attention: to a smaller vector, its norm, and from it to the heads' queries
    QUERY_DOWN_NORM = auto()
    QUERY_UP = auto()
    LATENT = auto()  # to the latent and the rotated key that all heads share
    LATENT_NORM = auto()
    KEY_UP = auto()  # of each head, [latent, key]
    VALUE_UP = auto()  # of each head, [value, latent]
    KEY_VALUE_UP = auto()  # of each head, [key + value, latent]: both in one, as in files from before 2025
    ATTENTION_OUTPUT = auto()
    OUTPUT_BIAS = auto()  # of attention's output
    SINKS = auto()
    FFN_NORM = auto()
    ROUTER = auto()
    ROUTER_BIAS = auto()
    SELECTION_BIAS = auto()  # added to the router's scores for the choice only
    GATE = auto()
    UP = auto()
    DOWN = auto()
    GATE_BIAS = auto()
    UP_BIAS = auto()
    DOWN_BIAS = auto()
    SHARED_ROUTER = auto()  # [D], of gated shared experts
    SHARED_GATE = auto()
    SHARED_UP = auto()
    SHARED_DOWN = auto()
    DENSE_GATE = auto()  # of a dense layer's feed-forward
    DENSE_UP = auto()
    DENSE_DOWN = auto()
    OUTPUT_NORM = auto()
    OUTPUT = auto()


EXPERTS = (Role.GATE, Role.UP, Role.DOWN)
"""Stacks of the routed experts' matrices."""

EXPERT_BIASES = (Role.GATE_BIAS, Role.UP_BIAS, Role.DOWN_BIAS)
"""Stacks of their biases."""

FLOATS = frozenset(
    (
        *(Role.ATTENTION_NORM, Role.QUERY_NORM, Role.KEY_NORM, Role.FFN_NORM, Role.OUTPUT_NORM),
        *(Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS, Role.OUTPUT_BIAS, Role.SINKS),
        *(Role.QUERY_DOWN_NORM, Role.LATENT_NORM, Role.ROPE_DIVISORS),
        *(Role.ROUTER, Role.ROUTER_BIAS, Role.SELECTION_BIAS, Role.SHARED_ROUTER, *EXPERT_BIASES),
    )
)
"""Small tensors that are float32 in memory, whatever the file has."""


@dataclass(frozen=True)
class ModelTensor:
    """A tensor's role, its name in GGUF (less the block's prefix), and its shape.

    shape: letters as in `config.py` and `head_dim`, or a product of them, slowest dimension first as in numpy.
    optional: some models of the architecture do without it, in all layers.
    of_expert: of a stack of experts, the name of a tensor with expert `{}` alone, which some files have in its place.
    """

    role: Role
    name: str
    shape: tuple[str, ...]
    layers: Layers = Layers.ALL
    optional: bool = False
    of_expert: str | None = None


ROPE_DIVISORS = ModelTensor(Role.ROPE_DIVISORS, "rope_freqs.weight", ("pairs",))
"""Divides the frequency of each rotated pair; of models whose RoPE is scaled as Llama 3.1's, of any architecture."""


@dataclass(frozen=True)
class Architecture:
    """One row: parts, and tensors before, in each of and after the blocks, in file order."""

    name: str
    """For users."""
    gguf_name: str
    """`general.architecture`, and the prefix of the keys of its hyper-parameters."""
    norm: Norm
    qk_norm: QkNorm
    attention_bias: AttentionBias
    window: Window
    rotary: Rotary
    router: RouterRule
    """Where the file's keys say nothing else."""
    activation: Activation
    shared_experts: SharedExperts
    dense_layers: DenseLayers
    inputs: tuple[ModelTensor, ...]
    block: tuple[ModelTensor, ...]
    outputs: tuple[ModelTensor, ...]
    may_tie: bool = True
    """Whether a file may do without the output matrix; llama.cpp demands it for some."""
    attention: AttentionKind = AttentionKind.HEADS
    scaled: bool = False
    """Whether embeddings, residuals, attention's scores and logits have multipliers, as in Granite."""
    sinks: Sinks = Sinks.NONE
    expert_bias: ExpertBias = ExpertBias.NONE

    @property
    def has_experts(self) -> bool:
        """Whether some layers have routed experts."""
        return self.dense_layers is not DenseLayers.EVERY

    def block_tensors(self, *, dense: bool, absent: Collection[Role] = ()) -> list[ModelTensor]:
        """The tensors of a block, in file order: of a dense or of a sparse layer, without those in `absent`."""
        other = Layers.SPARSE if dense else Layers.DENSE
        return [tensor for tensor in self.block if tensor.layers is not other and tensor.role not in absent]

    def tensor_name(self, role: Role, layer: int | None = None) -> str:
        """Name of a role's tensor, in a layer's block or, without one, outside of all; KeyError where there is none."""
        for tensor in self.inputs + self.outputs if layer is None else self.block:
            if tensor.role is role:
                return tensor.name if layer is None else f"blk.{layer}.{tensor.name}"
        raise KeyError(f"{self.name} has no tensor in the role {role.name}")


def first_unknown(architecture: Architecture, known: Sequence[Architecture]) -> str | None:
    """The first part of an architecture that none of `known` has, as "rotary: halves"; None where each part is known.

    A path that runs some architectures runs every other one whose parts are theirs.
    """
    for field in fields(architecture):
        value = getattr(architecture, field.name)
        if isinstance(value, StrEnum) and all(value != getattr(each, field.name) for each in known):
            return f"{field.name}: {value}"
    return None

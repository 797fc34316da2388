"""An architecture as a value: the parts of its blocks and the tensors that they have. Declares; computes nothing.

A row of the table in `fiddler.models`. `transformer.py` runs every declared architecture; the faster paths (compiled
decode step, captured graphs) say with `first_unknown` whether they know its parts, and are skipped otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, StrEnum, auto

__all__ = [
    "EXPERTS",
    "FLOATS",
    "Activation",
    "Architecture",
    "AttentionBias",
    "DenseLayers",
    "ModelTensor",
    "Norm",
    "QkNorm",
    "Role",
    "Rotary",
    "RouterRule",
    "SharedExperts",
    "Window",
    "first_unknown",
]


class Norm(StrEnum):
    """Normalises the input of attention and of the experts."""

    RMS = "rms"  # Zhang and Sennrich 2019


class QkNorm(StrEnum):
    """RMS-normalises queries and keys before the rotary embedding."""

    NONE = "none"
    HEAD = "head"  # each head by itself, as in Qwen3-MoE
    VECTOR = "vector"  # all heads together, as in OLMoE


class AttentionBias(StrEnum):
    """Biases of attention's products."""

    NONE = "none"


class Window(StrEnum):
    """Layers that attend to the last `Config.sliding_window` positions only, where it is set."""

    EVERY_LAYER = "every layer"


class Rotary(StrEnum):
    """Elements of a head that the rotary embedding rotates together."""

    NEIGHBOURS = "neighbours"  # 2 i and 2 i + 1; llama.cpp: ROPE_TYPE_NORM
    HALVES = "halves"  # i and i + head_dim / 2; llama.cpp: ROPE_TYPE_NEOX


class RouterRule(StrEnum):
    """How a token's experts and their routing weights follow from the router's logits."""

    SOFTMAX_RENORMALISED = "softmax, renormalised"  # softmax, top K, divided by their sum: softmax of the K largest
    SOFTMAX = "softmax"  # softmax, top K


class Activation(StrEnum):
    """Activation of an expert's gate."""

    SILU = "silu"


class SharedExperts(StrEnum):
    """Experts that every token uses."""

    NONE = "none"


class DenseLayers(StrEnum):
    """Layers with one feed-forward in place of experts."""

    NONE = "none"


class Role(Enum):
    """The use of a tensor; an architecture has at most one tensor of each in a block."""

    TOKEN_EMBEDDING = auto()
    ATTENTION_NORM = auto()
    QUERY = auto()
    KEY = auto()
    VALUE = auto()
    ATTENTION_OUTPUT = auto()
    FFN_NORM = auto()
    ROUTER = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()
    OUTPUT_NORM = auto()
    OUTPUT = auto()


EXPERTS = (Role.GATE, Role.UP, Role.DOWN)
"""Stacks of the routed experts' matrices."""

FLOATS = frozenset((Role.ATTENTION_NORM, Role.FFN_NORM, Role.ROUTER, Role.OUTPUT_NORM))
"""Small tensors that are float32 in memory, whatever the file has."""


@dataclass(frozen=True)
class ModelTensor:
    """A tensor's role, its name in GGUF (less the block's prefix), and its shape.

    shape: letters as in `config.py` and `head_dim`, or a product of them, slowest dimension first as in numpy.
    """

    role: Role
    name: str
    shape: tuple[str, ...]


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
    activation: Activation
    shared_experts: SharedExperts
    dense_layers: DenseLayers
    inputs: tuple[ModelTensor, ...]
    block: tuple[ModelTensor, ...]
    outputs: tuple[ModelTensor, ...]

    def tensors(self, layers: int, *, tied: bool) -> dict[str, ModelTensor]:
        """Every tensor of a model by its name, in file order; tied: the embedding is the output matrix, too."""
        found = {tensor.name: tensor for tensor in self.inputs}
        for layer in range(layers):
            found.update({f"blk.{layer}.{tensor.name}": tensor for tensor in self.block})
        found.update({tensor.name: tensor for tensor in self.outputs if not (tied and tensor.role is Role.OUTPUT)})
        return found

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

"""Hyper-parameters of a model, and the tensor shapes they imply. Knows neither torch nor files.

Letters used in all rooms: `T` tokens, `D` model width (`embedding_length`), `F` expert width
(`expert_feed_forward_length`), `E` experts, `K` experts a token, `H` heads, `G` KV heads, `L` layers, `V` vocabulary;
here also `S`, the shared experts' joint width, and `I`, the width of dense layers (`feed_forward_length`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fiddler.errors import FileFormatError
from fiddler.models.architecture import Architecture, Layers, ModelTensor, Role, RouterRule

__all__ = ["Config"]

_MAX_DIMENSION = 1 << 24  # keeps the product of any three dimensions far from 2**63


@dataclass(frozen=True)
class Config:
    """One model's architecture and hyper-parameters; attribute names are GGUF's, less the architecture's prefix.

    `metadata.py` reads them from a file, and writes them.
    """

    architecture: Architecture
    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    expert_feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int  # `attention.key_length`
    expert_count: int
    expert_used_count: int
    rms_epsilon: float
    rope_freq_base: float
    sliding_window: int | None = None  # positions that a query attends to, its own included
    router: RouterRule = field(default_factory=RouterRule)
    rope_dimension_count: int | None = None  # elements of a head that are rotated, its first ones; None: all
    feed_forward_length: int = 0  # of dense layers
    leading_dense_block_count: int = 0
    expert_shared_feed_forward_length: int = 0
    absent: frozenset[Role] = frozenset()  # optional tensors that this model does without
    attention_scale: float | None = None  # of q . k; None: head_dim ** -0.5
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the feed-forward add
    logit_scale: float = 1.0  # logits are divided by it
    clamp_kqv: float | None = None  # queries, keys and values are clamped to its negative and to it

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "context_length",
            "embedding_length",
            "block_count",
            "expert_feed_forward_length",
            "head_count",
            "head_count_kv",
            "head_dim",
            "expert_count",
            "expert_used_count",
        ):
            self._check_range(name, 1, _MAX_DIMENSION)
        has = {tensor.role for tensor in self.architecture.block} - self.absent
        self._check_range("feed_forward_length", int(self.leading_dense_block_count > 0), _MAX_DIMENSION)
        self._check_range("expert_shared_feed_forward_length", int(Role.SHARED_GATE in has), _MAX_DIMENSION)
        self._check_range("leading_dense_block_count", 0, self.block_count - 1)
        if self.leading_dense_block_count and Role.DENSE_GATE not in has:
            raise FileFormatError(
                f"leading_dense_block_count is {self.leading_dense_block_count}; every layer of a "
                f"{self.architecture.name} has experts"
            )
        if self.expert_used_count > self.expert_count:
            raise FileFormatError(
                f"expert_used_count is {self.expert_used_count}, but there are only {self.expert_count} experts"
            )
        if self.head_count % self.head_count_kv:
            raise FileFormatError(
                f"head_count is {self.head_count}, not a multiple of head_count_kv {self.head_count_kv}"
            )
        if self.head_dim % 2:
            raise FileFormatError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        rotated = self.rotated
        if rotated % 2 or not 2 <= rotated <= self.head_dim:
            raise FileFormatError(f"rope.dimension_count is {rotated}; it must be even, and at most {self.head_dim}")
        if not (math.isfinite(self.rms_epsilon) and 0.0 <= self.rms_epsilon < 1.0):
            raise FileFormatError(f"layer_norm_rms_epsilon is {self.rms_epsilon}; it must lie in [0, 1)")
        if not (math.isfinite(self.rope_freq_base) and self.rope_freq_base > 0.0):
            raise FileFormatError(f"rope.freq_base is {self.rope_freq_base}; it must be positive")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 1 << 31:
            raise FileFormatError(f"sliding_window is {self.sliding_window}; it must lie between 1 and 2**31 - 1")
        for name in ("attention_scale", "embedding_scale", "residual_scale", "logit_scale", "clamp_kqv"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise FileFormatError(f"{name} is {value}; it must be positive")
        self._check_router()

    def _check_range(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise FileFormatError(f"{name} is {value}; it must lie between {least} and {most}")

    def _check_router(self) -> None:
        rule, experts = self.router, self.expert_count
        if not (math.isfinite(rule.scale) and rule.scale > 0.0):
            raise FileFormatError(f"expert_weights_scale is {rule.scale}; it must be positive")
        if not 1 <= rule.groups_used <= rule.groups or experts % rule.groups:
            raise FileFormatError(
                f"{rule.groups_used} of {rule.groups} groups of experts are used; {experts} experts must divide into "
                "equal groups"
            )
        if self.expert_used_count > experts // rule.groups * rule.groups_used:
            raise FileFormatError(
                f"expert_used_count is {self.expert_used_count}, but {rule.groups_used} of {rule.groups} groups have "
                f"only {experts // rule.groups * rule.groups_used} experts"
            )

    @property
    def rotated(self) -> int:
        """Elements of a head that are rotated: its first ones."""
        return self.head_dim if self.rope_dimension_count is None else self.rope_dimension_count

    @property
    def sparse_layers(self) -> range:
        """The layers with routed experts: the last ones. Experts are numbered by their place in it."""
        return range(self.leading_dense_block_count, self.block_count)

    def has(self, role: Role) -> bool:
        """Whether the model's blocks, some or all, have a tensor in this role."""
        if role in self.absent:
            return False
        dense = self.leading_dense_block_count > 0
        return any(each.role is role and (dense or each.layers is not Layers.DENSE) for each in self.architecture.block)

    def shape(self, tensor: ModelTensor) -> tuple[int, ...]:
        """The shape of a tensor of this model, slowest dimension first as in numpy."""
        sizes = {
            "V": self.vocab_size,
            "D": self.embedding_length,
            "F": self.expert_feed_forward_length,
            "I": self.feed_forward_length,
            "S": self.expert_shared_feed_forward_length,
            "E": self.expert_count,
            "H": self.head_count,
            "G": self.head_count_kv,
            "head_dim": self.head_dim,
        }
        return tuple(math.prod(sizes[letter] for letter in dimension.split(" * ")) for dimension in tensor.shape)

    def tensors(self, *, tied: bool) -> dict[str, ModelTensor]:
        """Every tensor of the model by its name, in file order; `tied`: `token_embd` is the output weight, too."""
        found = {tensor.name: tensor for tensor in self.architecture.inputs}
        for layer in range(self.block_count):
            dense = layer < self.leading_dense_block_count
            for tensor in self.architecture.block_tensors(dense=dense, absent=self.absent):
                found[f"blk.{layer}.{tensor.name}"] = tensor
        for tensor in self.architecture.outputs:
            if not (tied and tensor.role is Role.OUTPUT):
                found[tensor.name] = tensor
        return found

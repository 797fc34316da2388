"""Hyper-parameters of a model, and the tensor shapes they imply. Knows neither torch nor files.

Letters used in all rooms: `T` tokens, `D` model width (`embedding_length`), `F` expert width
(`expert_feed_forward_length`), `E` experts, `K` experts a token, `H` heads, `G` KV heads, `L` layers, `V` vocabulary;
here also `S`, the shared experts' joint width, and `I`, the width of dense layers (`feed_forward_length`); and the
widths of latent attention, see `LatentWidths`: of a head's key, `plain_key` elements are not rotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fiddler.errors import FileFormatError
from fiddler.models.architecture import (
    ROPE_DIVISORS,
    Architecture,
    AttentionKind,
    Layers,
    ModelTensor,
    Role,
    RouterRule,
    Window,
)
from fiddler.models.rope_scaling import RopeKind, RopeScaling

__all__ = ["Config", "LatentWidths"]

_TOGETHER = (  # optional tensors that a model has all of, or none
    (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS),
    (Role.QUERY_NORM, Role.KEY_NORM),
    (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    (Role.QUERY_DOWN, Role.QUERY_DOWN_NORM, Role.QUERY_UP),
)
_MAX_ROTATED = 1 << 16  # elements of a head: each pair has a frequency
_MAX_DIMENSION = 1 << 24  # keeps the product of any three dimensions far from 2**63


@dataclass(frozen=True)
class LatentWidths:
    """Widths of multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

    `Config.head_dim` is the width of what the KV cache holds: a rotated key and the latent, which all heads share.
    """

    latent: int  # `attention.kv_lora_rank`
    key: int  # of a head, its rotated elements included: `attention.key_length_mla`
    value: int  # of a head: `attention.value_length_mla`
    query: int = 0  # `attention.q_lora_rank`; 0: queries are one product of the hidden state


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
    rms_epsilon: float  # of layer norms, too
    rope_freq_base: float
    sliding_window: int | None = None  # positions that a query attends to, its own included
    router: RouterRule = field(default_factory=RouterRule)
    rope_dimension_count: int | None = None  # elements of a head that are rotated, its first ones; None: all
    feed_forward_length: int = 0  # of dense layers
    leading_dense_block_count: int = 0  # `block_count` where no layer has experts
    expert_shared_feed_forward_length: int = 0
    absent: frozenset[Role] = frozenset()  # optional tensors that this model does without
    attention_scale: float | None = None  # of q . k; None: head_dim ** -0.5
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the feed-forward add
    logit_scale: float = 1.0  # logits are divided by it
    clamp_kqv: float | None = None  # queries, keys and values are clamped to its negative and to it
    rope_scaling: RopeScaling | None = None
    latent: LatentWidths | None = None  # of latent attention

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "context_length",
            "embedding_length",
            "block_count",
            "head_count",
            "head_count_kv",
            "head_dim",
        ):
            self._check_range(name, 1, _MAX_DIMENSION)
        experts = self.architecture.has_experts
        for name in ("expert_feed_forward_length", "expert_count", "expert_used_count"):
            if not experts and getattr(self, name):
                raise FileFormatError(f"{name} is {getattr(self, name)}; a {self.architecture.name} has no experts")
            self._check_range(name, int(experts), _MAX_DIMENSION)
        has = {tensor.role for tensor in self.architecture.block} - self.absent
        self._check_range("feed_forward_length", int(self.leading_dense_block_count > 0), _MAX_DIMENSION)
        self._check_range("expert_shared_feed_forward_length", int(Role.SHARED_GATE in has), _MAX_DIMENSION)
        least, most = (0, self.block_count - 1) if experts else (self.block_count, self.block_count)
        self._check_range("leading_dense_block_count", least, most)
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
        if not (math.isfinite(self.rms_epsilon) and 0.0 <= self.rms_epsilon < 1.0):
            raise FileFormatError(f"{self.architecture.norm.epsilon_key} is {self.rms_epsilon}; it must lie in [0, 1)")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 1 << 31:
            raise FileFormatError(f"sliding_window is {self.sliding_window}; it must lie between 1 and 2**31 - 1")
        for name in ("attention_scale", "embedding_scale", "residual_scale", "logit_scale", "clamp_kqv"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise FileFormatError(f"{name} is {value}; it must be positive")
        self._check_rope()
        self._check_latent()
        self._check_router()
        self._check_absent()

    def _check_range(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise FileFormatError(f"{name} is {value}; it must lie between {least} and {most}")

    def _check_rope(self) -> None:
        rotated, base, scaling = self.rotated, self.rope_freq_base, self.rope_scaling
        most = min(self.head_dim, _MAX_ROTATED)
        if rotated % 2 or not 2 <= rotated <= most:
            raise FileFormatError(f"rope.dimension_count is {rotated}; it must be even, and at most {most}")
        if not (math.isfinite(base) and base > 0.0):
            raise FileFormatError(f"rope.freq_base is {base}; it must be positive")
        if scaling is None:
            return
        if scaling.kind is RopeKind.YARN and base <= 1.0:
            raise FileFormatError(f"rope.freq_base is {base}; YaRN needs one above 1")
        if scaling.log_multiplier and self.architecture.attention is not AttentionKind.LATENT:
            raise FileFormatError(
                f"rope.scaling.yarn_log_multiplier is {scaling.log_multiplier}; a {self.architecture.name} has none"
            )
        if scaling.divisors and len(scaling.divisors) != rotated // 2:
            raise FileFormatError(f"{len(scaling.divisors)} divisors of frequencies for {rotated // 2} rotated pairs")

    def _check_latent(self) -> None:
        """Widths of latent attention, and one form of its queries and of its heads' matrices."""
        widths = self.latent
        if (widths is not None) != (self.architecture.attention is AttentionKind.LATENT):
            raise FileFormatError(f"a {self.architecture.name} needs attention {self.architecture.attention}")
        if widths is None:
            return
        least = self.rotated + 1  # a key has elements that are not rotated
        for name, value, low in (
            ("kv_lora_rank", widths.latent, 1),
            ("key_length_mla", widths.key, least),
            ("value_length_mla", widths.value, 1),
            ("q_lora_rank", widths.query, 0),
        ):
            if not low <= value <= _MAX_DIMENSION:
                raise FileFormatError(f"attention.{name} is {value}; it must lie between {low} and {_MAX_DIMENSION}")
        if self.head_dim != widths.latent + self.rotated or self.head_count_kv != 1:
            raise FileFormatError(
                f"attention.key_length is {self.head_dim} of {self.head_count_kv} KV heads; one KV head of "
                f"kv_lora_rank {widths.latent} + rope.dimension_count {self.rotated} elements runs"
            )
        has_query = Role.QUERY not in self.absent
        if has_query == bool(widths.query) or has_query == (Role.QUERY_DOWN not in self.absent):
            raise FileFormatError(
                f"attention.q_lora_rank is {widths.query}; attn_q_a and attn_q_b belong to a positive one, attn_q to 0"
            )
        if (Role.KEY_UP in self.absent) != (Role.VALUE_UP in self.absent) or (
            (Role.KEY_UP in self.absent) == (Role.KEY_VALUE_UP in self.absent)
        ):
            raise FileFormatError("attn_kv_b, or both of attn_k_b and attn_v_b, must be there; convert the model again")

    def _check_absent(self) -> None:
        for roles in _TOGETHER:
            missing = next((role for role in roles if role in self.absent), None)
            present = next((role for role in roles if role not in self.absent and self.has(role)), None)
            if missing is not None and present is not None:
                names = [
                    each.name for role in (missing, present) for each in self.architecture.block if each.role is role
                ]
                raise FileFormatError(f"no layer has {names[0]}, but {names[1]} is there; convert the model again")

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
    def rotated_scale(self) -> float:
        """The number that rotated queries and keys are multiplied by: 1, or YaRN's."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor

    def window(self, layer: int) -> int | None:
        """Positions that a layer's queries attend to, their own included; None: all."""
        return None if self.architecture.window is Window.EVERY_SECOND and layer % 2 else self.sliding_window

    @property
    def cache_window(self) -> int | None:
        """The last positions that some layer still attends to; None: all."""
        return None if self.architecture.window is Window.EVERY_SECOND else self.sliding_window

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
            "qkv": (self.head_count + 2 * self.head_count_kv) * self.head_dim,
            "pairs": self.rotated // 2,
        }
        if (widths := self.latent) is not None:
            plain = widths.key - self.rotated
            sizes |= {"query": widths.query, "latent": widths.latent, "key": widths.key, "value": widths.value}
            sizes |= {"plain_key": plain, "plain_key_value": plain + widths.value}
        return tuple(math.prod(sizes[letter] for letter in dimension.split(" * ")) for dimension in tensor.shape)

    def tensors(self, *, tied: bool) -> dict[str, ModelTensor]:
        """Every tensor of the model by its name, in file order; `tied`: `token_embd` is the output weight, too."""
        found = {tensor.name: tensor for tensor in self.architecture.inputs}
        if self.rope_scaling is not None and self.rope_scaling.kind is RopeKind.DIVISORS:
            found[ROPE_DIVISORS.name] = ROPE_DIVISORS
        for layer in range(self.block_count):
            dense = layer < self.leading_dense_block_count
            for tensor in self.architecture.block_tensors(dense=dense, absent=self.absent):
                found[f"blk.{layer}.{tensor.name}"] = tensor
        for tensor in self.architecture.outputs:
            if not (tied and tensor.role is Role.OUTPUT):
                found[tensor.name] = tensor
        return found

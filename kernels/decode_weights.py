"""The weights that the compiled decode step takes, one value a block, and the checks of their shapes. Knows arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.expert_matrices import ExpertMatrices, check_experts, check_stored
from fiddler.kernels.norm_router import Routing, check_rule

__all__ = ["EXPERT_MATRICES", "MATRICES", "BlockParts", "BlockWeights", "check_blocks"]


MATRICES = (
    *("attn_q", "attn_k", "attn_v", "attn_output"),
    *("gate", "up", "down", "dense_gate", "dense_up", "dense_down"),
)
"""Names of a block's stored matrices."""
EXPERT_MATRICES = ("gate", "up", "down")


def _none() -> np.ndarray:
    return np.empty(0, np.float32)


@dataclass(frozen=True)
class BlockWeights:
    """One transformer block's weights: float32, or stored as a `WeightFormat` where no type is noted.

    Read-only mappings will do.

    A block has routed experts (`ffn_gate_inp`, `gate`, `up`, `down`), or a dense feed-forward of width I, or both: then
    that is the shared experts.
    """

    attn_norm: np.ndarray  # float32 [D]
    attn_q: np.ndarray  # [H * head_dim, D]
    attn_k: np.ndarray  # [G * head_dim, D]
    attn_v: np.ndarray  # [G * head_dim, D]
    attn_output: np.ndarray  # [D, H * head_dim]
    ffn_norm: np.ndarray  # float32 [D]
    ffn_gate_inp: np.ndarray | None = None  # float32 [E, D]
    gate: ExpertMatrices | None = None  # [E, F, D]
    up: ExpertMatrices | None = None  # [E, F, D]
    down: ExpertMatrices | None = None  # [E, D, F]
    attn_bias: np.ndarray = field(default_factory=_none)  # float32 [(H + 2 G) * head_dim], of queries, keys and values
    q_norm: np.ndarray = field(default_factory=_none)  # float32 [head_dim], each head; or [H * head_dim], all together
    k_norm: np.ndarray = field(default_factory=_none)  # float32 [head_dim] or [G * head_dim]
    selection_bias: np.ndarray = field(default_factory=_none)  # float32 [E]
    dense_gate: np.ndarray | None = None  # [I, D]
    dense_up: np.ndarray | None = None  # [I, D]
    dense_down: np.ndarray | None = None  # [D, I]
    shared_gate: np.ndarray = field(default_factory=_none)  # float32 [D], whose sigmoid weighs the shared experts
    output_bias: np.ndarray = field(default_factory=_none)  # float32 [D], of attn_output
    sinks: np.ndarray = field(default_factory=_none)  # float32 [H], see `attend_each`
    router_bias: np.ndarray = field(default_factory=_none)  # float32 [E]
    variants: Mapping[str, KernelVariant] = field(default_factory=dict)  # of matrices by name, where not the step's

    @property
    def sparse(self) -> bool:
        """Whether it has routed experts."""
        return self.gate is not None

    @cached_property
    def matrices(self) -> tuple[np.ndarray | None, ...]:
        """All stored matrices but experts, in the order in which `decode_step.decode` takes their addresses."""
        return tuple(getattr(self, name) for name in MATRICES if name not in EXPERT_MATRICES)

    @property
    def experts(self) -> tuple[ExpertMatrices, ...]:
        """gate, up and down of the routed experts, or nothing."""
        return tuple(each for each in (self.gate, self.up, self.down) if each is not None)


@dataclass(frozen=True)
class BlockParts:
    """How all blocks compute, beside their weights.

    halves: see `heads.prepare_heads`. clamp: of queries, keys and values; 0 for none. query_scale: a factor of q . k
    beside head_dim ** -0.5. residual_scale: of what attention and the feed-forwards add. embedding_scale: of the
    embeddings. logit_scale: logits are divided by it. layer_norm: norms take the mean off, too. clamped: the routed
    experts' activation is `epilogues.clamped_swiglu`. every_second: only the first of each two layers has the window.
    """

    routing: Routing = field(default_factory=Routing)
    halves: int = 0
    clamp: float = 0.0
    query_scale: float = 1.0
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    layer_norm: bool = False
    clamped: bool = False
    every_second: bool = False


def check_blocks(
    blocks: Sequence[BlockWeights],
    output_norm: np.ndarray,
    output: np.ndarray,
    variants: tuple[KernelVariant, KernelVariant],
    frequencies: np.ndarray,
    experts_used: int,
    window: int | None,
    parts: BlockParts,
) -> None:
    """Raise ValueError where a shape, a data type, the memory order or a number does not fit.

    variants: of the blocks' matrices, where they name no other, and of `output`.
    """
    if not blocks:
        raise ValueError("no blocks")
    last, head_dim = blocks[-1], 2 * frequencies.size
    gate_shape = (0, 0, 0) if last.gate is None else last.gate.shape
    if output.ndim != 2 or last.attn_q.ndim != 2 or last.attn_k.ndim != 2:
        raise ValueError(
            f"output is {output.shape}, attn_q {last.attn_q.shape}, attn_k {last.attn_k.shape}; expected [V, D], "
            "[H * head_dim, D], [G * head_dim, D]"
        )
    queries, keys, experts = len(last.attn_q), len(last.attn_k), gate_shape[0]
    if frequencies.ndim != 1 or not head_dim or queries % head_dim or not keys or keys % head_dim or queries % keys:
        raise ValueError(f"{queries} rows of attn_q, {keys} of attn_k, {frequencies.shape} frequencies")
    if not min(experts, 1) <= experts_used <= experts:
        raise ValueError(f"{experts_used} of {experts} experts")
    if experts:
        check_rule(parts.routing, experts, experts_used)
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; give at least 1")
    if parts.halves % 2 or not 0 <= parts.halves <= head_dim:
        raise ValueError(f"{parts.halves} elements of a head of {head_dim} are rotated")
    dense = [not block.sparse for block in blocks]
    if dense != sorted(dense, reverse=True) or (dense[0] and last.shared_gate.size):
        raise ValueError("layers without routed experts must be the first ones, and have no shared gate")
    width, (variant, of_output) = output_norm.size, variants
    for block in blocks:
        _check_block(block, last, width, head_dim, variant)
    _check("output_norm", output_norm, (width,), np.float32)
    check_stored("output", output, (len(output), width), of_output)
    groupings = {each.grouping for block in blocks for each in block.variants.values()}
    if groupings | {of_output.grouping} != {variant.grouping}:
        raise ValueError("the matrices have formats that one step cannot multiply")
    _check("frequencies", frequencies, frequencies.shape, np.float32)


def _check_block(block: BlockWeights, last: BlockWeights, width: int, head_dim: int, variant: KernelVariant) -> None:
    queries, keys = len(last.attn_q), len(last.attn_k)
    experts, hidden, _ = (0, 0, 0) if last.gate is None else last.gate.shape
    floats: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,)}
    floats |= {"attn_bias": _like(last.attn_bias, queries + 2 * keys), "q_norm": _like(last.q_norm, queries, head_dim)}
    floats |= {"k_norm": _like(last.k_norm, keys, head_dim), "output_bias": _like(last.output_bias, width)}
    floats["sinks"] = _like(last.sinks, queries // head_dim)
    bits: dict[str, tuple[int, ...]] = {"attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width)}
    bits["attn_output"] = (width, queries)
    of_experts: dict[str, tuple[int, int, int]] = {}
    if block.sparse:
        floats |= {"ffn_gate_inp": (experts, width), "selection_bias": _like(last.selection_bias, experts)}
        floats |= {"shared_gate": _like(last.shared_gate, width), "router_bias": _like(last.router_bias, experts)}
        of_experts |= {
            "gate": (experts, hidden, width),
            "up": (experts, hidden, width),
            "down": (experts, width, hidden),
        }
    if block.dense_gate is not None:
        inner = len(block.dense_gate)
        bits |= {"dense_gate": (inner, width), "dense_up": (inner, width), "dense_down": (width, inner)}
    elif not block.sparse:
        raise ValueError("a block has neither routed experts nor a dense feed-forward")
    for name, shape in floats.items():
        _check(name, getattr(block, name), shape, np.float32)
    for name, shape in bits.items():
        check_stored(name, getattr(block, name), shape, block.variants.get(name, variant))
    for name, shape in of_experts.items():
        check_experts(name, getattr(block, name), shape, block.variants.get(name, variant))


def _like(array: np.ndarray, *sizes: int) -> tuple[int, ...]:
    """The shape of a vector that all blocks have, of one of these sizes, or none has."""
    return next(((size,) for size in sizes if array.size == size), (sizes[0],) if array.size else (0,))


def _check(name: str, array: object, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if (
        not isinstance(array, np.ndarray)
        or array.shape != shape
        or array.dtype != dtype
        or not array.flags.c_contiguous
    ):
        kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(array)
        raise ValueError(f"{name} is {kind}; expected contiguous {np.dtype(dtype).name} {shape}")

"""A kernel variant: weights x activations x instruction set, as a value and as a Numba type.

Numba sees each `KernelVariant` as a type of its own, so each compiles to a kernel of its own, without the branches that
it rules out. The type's name is part of the key in Numba's on-disk cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox

from fiddler.kernels.machine.isa import TIERS, Tier, available_tiers
from fiddler.kernels.machine.tuning import TUNINGS, Tuning, current_tuning

__all__ = [
    "BLOCKS",
    "WEIGHTS",
    "KernelVariant",
    "activation_bytes",
    "amx",
    "bf16_pairs",
    "compiled",
    "constant_of",
    "int8_packed",
    "int8_rows",
    "k_blocked",
    "outer_rows",
    "outer_tokens",
    "panel_tokens",
    "quantised",
    "tuned",
]

_PLAIN = "bf16", "f16", "f32"
_QUANTISED = (
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs", "mxfp4"),
)
WEIGHTS = _PLAIN + _QUANTISED
"""Names of the weight formats that kernels read; `kernels.formats.FORMATS` has the formats themselves."""

BLOCKS = "blocks"
"""Stands for every quantised format in kernels that read no weights: one compilation serves files of mixed types."""


@dataclass(frozen=True)
class KernelVariant:
    """The types and the instructions that a kernel multiplies with.

    `weights`: the format's name, one of `WEIGHTS`. `activations`: "f32"; or "bf16": each is rounded to bf16 once,
    before the products; or "q8", of quantised weights: few tokens are rounded to int8 with a scale for each 32, for
    products of integers, and so are many where `int8_packed`; else many are rounded to bf16 as the weights are, where
    the CPU multiplies bf16 pairs. Sums of scaled products are float32 in any case. `tuning`: block sizes and
    thresholds; the row for this CPU unless given.
    """

    tier: Tier
    weights: str
    activations: str
    tuning: Tuning = field(default_factory=current_tuning)

    def __post_init__(self) -> None:
        partners = ("q8", "f32") if self.weights in (*_QUANTISED, BLOCKS) else ("bf16", "f32")
        if self.weights not in (*WEIGHTS, BLOCKS) or self.activations not in partners:
            raise ValueError(f"{self.weights} weights with {self.activations} activations: no kernel multiplies these")
        if self.tier not in available_tiers():
            raise ValueError(f"this CPU does not run the tier {self.tier.name}")

    @property
    def quantised(self) -> bool:
        """Whether weights lie in blocks with scales."""
        return self.weights not in _PLAIN

    @property
    def grouping(self) -> KernelVariant:
        """The variant for which kernels that read no weights are compiled: one for all quantised formats."""
        return replace(self, weights=BLOCKS) if self.quantised else self

    @property
    def int8_rows(self) -> bool:
        """The rows layout (few tokens) stores activations as int8 with scales."""
        return self.activations == "q8"

    @property
    def bf16_rows(self) -> bool:
        """The rows layout (few tokens) stores activations as bf16 bits; otherwise as float32, rounded or not."""
        return self.activations == "bf16" and self.weights == "bf16"

    @property
    def bf16_pairs(self) -> bool:
        """The packed layout (many tokens) stores bf16 pairs too, and the CPU multiplies these (`vdpbf16ps`)."""
        return (self.bf16_rows or self.int8_rows) and self.tier.dot_bf16 and not self.int8_packed

    @property
    def int8_packed(self) -> bool:
        """The packed layout (many tokens) stores activations as int8, too, multiplied as integers (`vpdpbusd`)."""
        tier = self.tier
        return self.int8_rows and self.tuning.int8_packed and tier.dot_int8 and tier.lanes == 16 and not tier.tiles

    @property
    def k_blocked(self) -> bool:
        """Several tokens in bf16 pairs are multiplied K-block by K-block: a block fits the first-level cache."""
        return self.bf16_rows and self.tier.dot_bf16 and self.tuning.k_blocked

    @property
    def amx(self) -> bool:
        """Many tokens are multiplied in AMX tile registers."""
        return self.bf16_pairs and self.tier.tiles


class _VariantType(types.Type):
    def __init__(self, tier: str, weights: str, activations: str, tuning: str) -> None:
        self.tier, self.weights, self.activations, self.tuning = tier, weights, activations, tuning
        super().__init__(name=f"KernelVariant({tier}, {weights}, {activations}, {tuning})")

    @property
    def variant(self) -> KernelVariant:
        tier = next(tier for tier in TIERS if tier.name == self.tier)
        return KernelVariant(tier, self.weights, self.activations, TUNINGS[self.tuning])


register_model(_VariantType)(models.OpaqueModel)


@typeof_impl.register(KernelVariant)
def _typeof_variant(value: KernelVariant, _context: object) -> _VariantType:
    return _VariantType(value.tier.name, value.weights, value.activations, value.tuning.name)


@unbox(_VariantType)
def _unbox_variant(_type: object, _value: object, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


def compiled(generator: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.extending.intrinsic`, for calls from compiled code only; a literal argument arrives as a literal type."""
    wrapped: Callable[..., Any] = intrinsic(prefer_literal=True)(generator)
    return wrapped


def constant_of(number: Callable[[KernelVariant], int], returns: types.Type) -> Any:
    """An intrinsic that compiles to a constant of the variant, so that LLVM drops the branches that it rules out."""

    @compiled
    def constant(_context: Any, variant: Any) -> Any:
        def generate(context: Any, _b: Any, signature: Any, _arguments: Any) -> ir.Value:
            return context.get_constant(signature.return_type, number(variant.variant))

        return returns(variant), generate

    return constant


def tuned(name: str) -> Any:
    """An intrinsic that compiles to this field of the variant's `Tuning`."""
    return constant_of(lambda variant: getattr(variant.tuning, name), types.intp)


bf16_pairs = constant_of(lambda variant: variant.bf16_pairs, types.boolean)
k_blocked = constant_of(lambda variant: variant.k_blocked, types.boolean)
quantised = constant_of(lambda variant: variant.quantised, types.boolean)
int8_rows = constant_of(lambda variant: variant.int8_rows, types.boolean)
int8_packed = constant_of(lambda variant: variant.int8_packed, types.boolean)
amx = constant_of(lambda variant: variant.amx, types.boolean)
outer_rows = constant_of(lambda variant: variant.tier.outer_rows, types.intp)
# with AMX, outer products compute only the remainders: the 32- and 48-token tiles need not be compiled
outer_tokens = constant_of(lambda variant: 16 if variant.amx else variant.tier.outer_tokens, types.intp)
activation_bytes = constant_of(lambda variant: 1 if variant.int8_rows else 2 if variant.bf16_rows else 4, types.intp)
"""Size of an activation in the rows layout [bytes]."""
panel_tokens = constant_of(lambda variant: 32 if variant.amx else 48, types.intp)
"""Tokens of a panel in the packed layout: those of the widest tile."""

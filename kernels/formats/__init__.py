"""Weight formats: how each is stored and how a vector of it is decoded. One file a format.

A format's module is imported when the format is looked up: a start imports those of the model's file.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from llvmlite import ir
from numba.core import types

from fiddler.kernels.codegen.llvm import I64
from fiddler.kernels.codegen.variant import KernelVariant, compiled
from fiddler.kernels.formats.block_format import BlockFormat
from fiddler.kernels.formats.weight_format import PlainFormat, WeightFormat

__all__ = ["BLOCK_FORMATS", "FORMATS", "GPU_FORMATS", "format_of", "plain_format_of", "stored_bytes"]

_PLAIN = {"bf16": "half", "f16": "half", "f32": "f32"}
_BLOCKS = {
    "q8_0": "q8_0",
    "q4_0": "q4_0",
    "q4_1": "q4_0",
    "q5_0": "q5_0",
    "q5_1": "q5_0",
    "q2_k": "q2_k",
    "q3_k": "q3_k",
    "q4_k": "q4_k",
    "q5_k": "q5_k",
    "q6_k": "q6_k",
    "iq4_nl": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "mxfp4": "mxfp4",
}
"""Modules beside this one, by the name of the format; each has it under the same name in capitals."""

_Format = TypeVar("_Format", bound=WeightFormat)


class _Formats(Mapping[str, _Format], Generic[_Format]):
    """Formats by name. Looking one up imports its module, the first time; names, their number and `in` import none."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules
        self._imported: dict[str, _Format] = {}

    def __getitem__(self, name: str) -> _Format:
        if name not in self._imported:
            module = import_module(f"{__name__}.{self._modules[name]}")
            self._imported[name] = getattr(module, name.upper())
        return self._imported[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


BLOCK_FORMATS: Mapping[str, BlockFormat] = _Formats(_BLOCKS)
"""The quantised formats, by their names."""
FORMATS: Mapping[str, WeightFormat] = _Formats({**_PLAIN, **_BLOCKS})
"""Every format that the kernels read, by its name."""
GPU_FORMATS = BLOCK_FORMATS.keys() - {"q2_k", "q3_k"}
"""Names of the quantised formats that a GPU decodes, too: those with a decoder in Triton."""


def format_of(variant: KernelVariant) -> WeightFormat:
    """The format of the weights that this variant reads."""
    return FORMATS[variant.weights]


def plain_format_of(variant: KernelVariant) -> PlainFormat:
    """The same, of a variant that reads weights one by one."""
    kind = FORMATS[variant.weights]
    assert isinstance(kind, PlainFormat)
    return kind


@compiled
def stored_bytes(_context: Any, variant: Any, weights: Any) -> Any:
    """For compiled code: `WeightFormat.row_bytes` of so many weights, which must be whole blocks."""
    kind = format_of(variant.variant)

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        blocks = arguments[1]
        if kind.block_length > 1:
            blocks = b.sdiv(blocks, ir.Constant(I64, kind.block_length))
        return b.mul(ir.Constant(I64, kind.block_bytes), blocks, flags=("nsw",))

    return types.intp(variant, types.intp), generate

"""Quantised copies of a model, written by the `gguf` package: blocks by our encoders, which are tested by themselves.

The package has no quantiser for K-quants; its dequantisers are the oracle of what such a file means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from fiddler.kernels.formats import BLOCK_FORMATS

__all__ = ["values_of", "write_quantised"]

_Q = gguf.GGMLQuantizationType


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor as float32, by the `gguf` package, in the shape of its weights."""
    shape = [int(n) for n in reversed(tensor.shape)]
    return gguf.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(shape)


def write_quantised(source: Path, target: Path, kind_of: Callable[[str], str | None]) -> Path:
    """Copy a GGUF with some tensors in another type, and return `target`.

    kind_of: tensor name -> "q4_k" and so on, "bf16", "f16", "f32"; None: as it is.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        kind = kind_of(tensor.name)
        if kind is None:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            continue
        values = values_of(tensor)
        if kind in BLOCK_FORMATS:
            writer.add_tensor(tensor.name, BLOCK_FORMATS[kind].encode(values), raw_dtype=_Q[kind.upper()])
        else:
            raw = gguf.quantize(values, _Q[kind.upper()])
            writer.add_tensor(tensor.name, raw, raw_dtype=_Q[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

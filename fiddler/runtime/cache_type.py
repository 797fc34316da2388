"""The type of a model's KV cache, by its weights and the user's options. Knows no memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fiddler.errors import RequestError
from fiddler.files.model_file import ModelFile
from fiddler.kernels import KernelVariant
from fiddler.runtime.q8_0_rows import BLOCK

__all__ = ["CacheTypes", "cache_types"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.uint8}


class CacheTypes(NamedTuple):
    """`stored`: of keys and values in memory; uint8 stands for Q8_0. `read_as`: in which a GPU multiplies them."""

    stored: torch.dtype
    read_as: torch.dtype


def cache_types(model_file: ModelFile, wanted: str | None, main: KernelVariant | None) -> CacheTypes:
    """The types for `wanted`, f32, f16 or q8_0; None: float16, or float32 where activations are.

    main: see `main_variant`. With float32 activations attention multiplies in float32, whatever is stored; with others
    in float16 what is stored in no more. Raises RequestError where the model's heads are no whole blocks of Q8_0.
    """
    default = torch.float16 if main is not None and main.activations != "f32" else torch.float32
    head_dim = model_file.config.head_dim
    if wanted == "q8_0" and head_dim % BLOCK:
        raise RequestError(
            f"cache_type_k q8_0: {model_file.file.shown_path} has heads of {head_dim} numbers, and blocks of Q8_0 have "
            f"{BLOCK}; give f16"
        )
    stored = default if wanted is None else _DTYPES[wanted]
    return CacheTypes(stored, torch.float32 if stored == torch.float32 else default)

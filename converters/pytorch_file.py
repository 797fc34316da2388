"""One PyTorch `.bin` file: a dictionary of tensors, loaded by torch's safe loader from a mapping.

The safe loader (`weights_only`) builds tensors only and runs no code of the file. Before torch 2.10 a file can make it
read and write elsewhere in memory (CVE-2026-24747); such a torch reads none here. Knows the container; does not know
the tensors' purpose or a model's other shards.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fiddler.converters.safetensors_file import Array, StoredTensor
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import present

if TYPE_CHECKING:
    import torch

__all__ = ["PytorchFile", "loads_safely"]

_SAFE_TORCH = (2, 10)  # https://github.com/pytorch/pytorch/security/advisories/GHSA-63cw-57p8-fm3p
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


class PytorchFile:
    """An open file: `tensors` by name, and their `rows`; the same as `SafetensorsFile`.

    Opening raises CheckpointError if the file is damaged or holds anything but tensors by name, or torch is too old.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded = _load(path)
        self.tensors: dict[str, StoredTensor] = {
            name: StoredTensor(name, path, _dtype(tensor), tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in self._loaded.items()
        }

    def rows(self, stored: StoredTensor, first: int, count: int) -> Array:
        """Rows `first` to `first + count` of a tensor viewed as a matrix [rows, last dimension].

        Returns [count, last dimension]; bfloat16 as uint16 bits. A view of the mapping where the tensor is contiguous.
        """
        import torch

        tensor = self._loaded[stored.name].detach()
        matrix = tensor.reshape(-1, stored.shape[-1])[first : first + count].contiguous()
        if matrix.dtype == torch.bfloat16:
            return matrix.view(torch.int16).numpy().view(np.uint16)
        values: Array = matrix.numpy()
        return values


def loads_safely(version: str) -> bool:
    """Whether the safe loader of a version of torch, as "2.13.0+cpu", is safe with files of strangers."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= _SAFE_TORCH


def _load(path: Path) -> dict[str, torch.Tensor]:
    import torch  # late: a checkpoint in safetensors needs no torch

    if not path.is_file():
        problem = "is no regular file" if present(path) else "is missing"
        raise CheckpointError(f"{path} {problem}; download the whole checkpoint")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty; download it again")
    if not loads_safely(torch.__version__):
        raise CheckpointError(
            f"{path}: torch {torch.__version__} can be misled by .bin files (CVE-2026-24747); install torch 2.10 or "
            "newer, or download the model's safetensors"
        )
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        reason = quoted(str(error).splitlines()[0], 100)
        raise CheckpointError(
            f"{path} does not load safely as PyTorch weights ({reason}): damaged, or it holds code; "
            "convert the model's safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = quoted((str(error).splitlines() or [""])[0], 100)
        raise CheckpointError(
            f"{path} is no PyTorch file, or a download that did not finish ({reason}); download it again"
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path} holds {quoted(type(loaded).__name__)}; it must be tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {quoted(name, 60)} is {quoted(type(tensor).__name__, 40)}, not a tensor; save the model with "
                "save_pretrained()"
            )
    return loaded


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _NAMES.get(name, name.upper())

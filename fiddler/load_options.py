"""Options of loading a model, checked as soon as they are made. Knows no model, no device and no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

from fiddler.errors import RequestError, quoted

__all__ = ["DEFAULT_CONTEXT", "CacheType", "Device", "LoadOptions", "Missing", "Precision", "parse_size"]

DEFAULT_CONTEXT = 4096  # [tokens]

Device = Literal["auto", "cpu", "cuda"]
Missing = Literal["auto", "cpu", "stream"]
Precision = Literal["fast", "exact"]
CacheType = Literal["f32", "f16", "q8_0"]

_CHOICES = {"precision": get_args(Precision), "device": get_args(Device), "missing": get_args(Missing)}
_CACHE_TYPES = "cache_type_k", "cache_type_v"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model runs; `fiddler.load` says what each field means.

    gpu_memory: limit [bytes]; None for nearly all that is free. context: positions [tokens]; None for
    `DEFAULT_CONTEXT`. Raises RequestError for a value out of range, and for `gpu_memory` with the device "cpu".
    """

    device: Device = "auto"
    gpu_memory: int | None = None
    gpu_experts: int | None = None
    missing: Missing = "auto"
    expert_counts: Path | None = None
    threads: int | None = None
    context: int | None = None
    precision: Precision = "fast"
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None

    def __post_init__(self) -> None:
        choices_of = {
            **_CHOICES,
            **{name: get_args(CacheType) for name in _CACHE_TYPES if getattr(self, name) is not None},
        }
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                *others, last = map(repr, choices)
                raise RequestError(f"{name} is {quoted(value)}; give {', '.join(others)} or {last}")
        for name, least in (("context", 1), ("gpu_experts", 0), ("gpu_memory", 1), ("threads", None)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise RequestError(f"{name} is {quoted(value)}; it must be a whole number")
            if least is not None and value < least:
                raise RequestError(f"{name} is {quoted(value)}; give {least} or more")
            if abs(int(value)) >= 1 << 63:
                raise RequestError(f"{name} is {quoted(value)}; give less than 2**63")
        if self.device == "cpu" and self.gpu_memory is not None:
            raise RequestError(
                f"--gpu-memory {self.gpu_memory / 2**30:.2f} GiB with --device cpu, or FIDDLER_DEVICE=cpu: "
                "leave out one of them"
            )

        if self.cache_type_k != self.cache_type_v:
            given = " and ".join(f"{name} {quoted(getattr(self, name))}" for name in _CACHE_TYPES)
            raise RequestError(f"{given}: keys and values have one type here; give both the same")

    @property
    def exact(self) -> bool:
        """Whether activations are float32 everywhere."""
        return self.precision == "exact"

    def capacity(self, context_length: int) -> int:
        """Positions that a sequence can have, where the model was trained with `context_length`."""
        return min(DEFAULT_CONTEXT if self.context is None else self.context, context_length)

    @property
    def needs_gpu(self) -> bool:
        """Whether the user requests a GPU: without one, loading must fail."""
        return self.device == "cuda" or self.gpu_memory is not None

    @property
    def of_gpu_only(self) -> bool:
        """Whether an option is given that has no effect without a GPU."""
        return self.expert_counts is not None or self.gpu_experts is not None or self.missing != "auto"


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24G", "8000MB" or "1073741824". Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text[:41].upper(), re.ASCII)
    if match is None or len(text) > 40 or (nbytes := int(float(match[1]) * _UNITS[match[2] or ""])) <= 0:
        raise RequestError(f"--gpu-memory {text[:40]!r}: give a size, as 24GiB or 8000MB")
    return nbytes

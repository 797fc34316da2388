"""This CPU's instruction sets and the kernel tiers that they allow. Knows nothing of weights or arrays."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache

from numba.core import config as numba_config
from numba.core.codegen import get_host_cpu_features

from fiddler.errors import RequestError

__all__ = ["TIERS", "Tier", "available_tiers", "choose_tier", "cpu_features"]


@dataclass(frozen=True)
class Tier:
    """One level of instruction sets, with the tile sizes that suit it."""

    name: str
    needs: frozenset[str]  # LLVM's feature names
    lanes: int  # float32 values in a vector
    registers: int  # vector registers
    outer_rows: int  # weight rows of an outer-product tile: their sums fill the vector registers
    outer_tokens: int  # tokens of an outer-product tile, at most
    dot_bf16: bool = False  # multiplies bf16 pairs and adds in float32 (`vdpbf16ps`)
    half_convert: bool = False  # converts binary16 in hardware
    tiles: bool = False  # multiplies bf16 matrices in tile registers (AMX)
    dot_int8: bool = False  # multiplies bytes and adds in int32 (`vpdpbusd`)


def cpu_features() -> frozenset[str]:
    """LLVM's names of the CPU features that Numba compiles for: the host's, unless `NUMBA_*` variables set others."""
    if numba_config.CPU_FEATURES is not None:
        flags = numba_config.CPU_FEATURES
    elif numba_config.CPU_NAME == "generic":
        flags = ""
    else:
        flags = get_host_cpu_features()
    return frozenset(feature[1:] for feature in flags.split(",") if feature.startswith("+"))


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_BF16 = _AVX512 | {"avx512bf16"}
_AMX = _BF16 | {"amx-tile", "amx-bf16"}

_VNNI = bool({"avx512vnni", "avxvnni"} & cpu_features())

TIERS = (
    Tier("amx_bf16", _AMX, 16, 32, 8, 48, dot_bf16=True, half_convert=True, tiles=True, dot_int8=_VNNI),
    Tier("avx512_bf16", _BF16, 16, 32, 8, 48, dot_bf16=True, half_convert=True, dot_int8=_VNNI),
    Tier("avx512", _AVX512, 16, 32, 8, 48, half_convert=True, dot_int8=_VNNI),
    Tier("avx2", _AVX2, 8, 16, 6, 16, half_convert=True),
    Tier("portable", frozenset(), 8, 8, 3, 16, half_convert="f16c" in cpu_features()),
)
"""Best first. An AVX512 tier uses VNNI where the CPU has it. The last tier runs on any CPU that LLVM compiles for, and
uses F16C where the CPU has it."""


@cache
def available_tiers() -> tuple[Tier, ...]:
    """The tiers that this process can run, best first."""
    features = cpu_features()
    return tuple(tier for tier in TIERS if tier.needs <= features and (not tier.tiles or _tiles_permitted()))


def _tiles_permitted() -> bool:
    """Request the tile registers' state from Linux, for all threads of the process; False where it refuses.

    Linux, Documentation/arch/x86/xstate.rst: system call 158, ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    return int(ctypes.CDLL(None).syscall(158, 0x1023, 18)) == 0


def choose_tier(name: str | None = None) -> Tier:
    """The tier `name`; without a name, the one that `FIDDLER_KERNEL` names, or the best available.

    Raises RequestError when there is no such tier or this CPU lacks its instructions.
    """
    available = available_tiers()
    name = name or os.environ.get("FIDDLER_KERNEL")
    if not name:
        return available[0]
    for tier in available:
        if tier.name == name:
            return tier
    names = ", ".join(tier.name for tier in available)
    raise RequestError(f"kernel {name!r} does not run here; this CPU offers {names}")

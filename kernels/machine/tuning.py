"""Block sizes, distances and thresholds of the kernels: one row a CPU family. Knows numbers; no kernels.

Nothing here changes a result beyond rounding; it changes speed. A row holds for a family because it was measured there:
each field says where. `kernels/fit_tuning.py` measures which row suits a CPU that is in no family, and stores its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fiddler.errors import RequestError
from fiddler.input_file import read_regular
from fiddler.kernels.machine.cpu import cpu_model, cpu_name
from fiddler.kernels.machine.isa import choose_tier

__all__ = [
    "NON_TEMPORAL",
    "TUNINGS",
    "Tuning",
    "check_store",
    "current_tuning",
    "damaged_store",
    "family_of",
    "is_fitted",
    "store_tuning",
    "tuning_source",
    "tuning_store",
]

_LARGEST_STORE = 1 << 20  # [bytes]; a fit takes 100 bytes

NON_TEMPORAL = 4
"""A prefetch level: as near as level 1, for data that is read once and should displace nothing else."""


@dataclass(frozen=True)
class Tuning:
    """One row. Figures: `docs/log/kernels-few-tokens.md` and `kernels-many-tokens.md`, by machine and date."""

    name: str

    weights_prefetch_level: int
    """Cache level that weights are prefetched into: 1, 2 or NON_TEMPORAL. One token, bf16, share of plain reads: Zen 4
    0.88 non-temporal and 1.00 at level 2 (2026-11-28); Emerald Rapids 61 to 70 GB/s non-temporal and 95 to 119 at level
    1 (2026-11-22); Zen 3 and 5 4 % of a token faster non-temporal, which leaves code and data in the caches."""

    k_blocked: bool
    """Whether several tokens in bf16 pairs are multiplied K-block by K-block. Zen 5: faster than whole rows one by one;
    Emerald Rapids: four whole rows at once are 1.1 to 1.5 times as fast (2026-11-23)."""

    int8_packed: bool = False
    """Whether many tokens are multiplied with quantised weights in int8, where vectors of 512 bits have `vpdpbusd` and
    there are no tile registers; otherwise in bf16 pairs or float32. Zen 5, experts of Mixtral's shape with 128 tokens
    each: Q8_0 1.6, Q6_K 1.42, Q4_K 1.41, Q5_K 1.36 times as fast as in bf16 pairs (2026-11-30); no other CPU was
    measured."""

    dot_prefetch_bytes: int = 8192
    """Prefetch distance of a dot-product tile [bytes]: 38 to 41, with 4 KB 41 to 42 GB/s on Zen 5 (2026-11-22)."""
    dot_pass_rows: int = 4
    """Weight rows that every tile of tokens reads before the next rows, with several tiles (Zen 3, 2026-11-23)."""
    compute_bound_tokens: int = 5
    """Tokens from which on the cores, not the memory, may limit the speed (4 to 5 tokens, Zen 5, 2026-11-22)."""
    l1_activation_bytes: int = 1 << 15
    """Activations that stay in the first-level cache while weights stream past [bytes] (Zen 5: 48 KB, 2026-11-22)."""
    k_block_elements: int = 1024
    """Elements of a K-block, at most (Zen 5, 2026-11-22)."""
    k_blocked_tile_tokens: int = 8
    """Tokens of a K-blocked dot-product tile, at most (Zen 5: f16 8 tokens 28.7 to 15.1 ms, 2026-11-22)."""

    float_row_tokens: int = 24
    """Tokens of an expert in rows with float32 activations; more are packed (Zen 3, 2026-11-23)."""
    pair_row_tokens: int = 28
    """The same in bf16 pairs: 24 are slower packed, by a third, 25 to 28 1.02 to 1.03 in rows (Intel, 2026-11-23)."""
    int8_row_tokens: int = 4
    """The same with int8 activations, and tokens that stay in rows beside packed ones."""
    int8_remainder_tokens: int = 2
    """Tokens that stay in rows beside packed ones in int8, at most: 18 tokens as fast either way, 19 and 20 are 1.2 to
    1.4 times as fast with all packed (Zen 5, Q6_K, 2026-11-30)."""
    k_blocked_row_tokens: int = 14
    """The same K-blocked (Zen 5, 2026-11-22)."""
    remainder_tokens: int = 8
    """Tokens that stay in rows beside packed ones, at most, with vectors of 16 lanes (Zen 5, 2026-11-22)."""
    remainder_tokens_8_lanes: int = 12
    """The same with vectors of 8 lanes (Zen 3, 2026-11-23)."""
    row_spread_lines: int = 39
    """Cache lines from row to row, modulo 64 sets: 0.618 of them spreads any number of rows (Zen 5, 2026-11-22)."""

    outer_k_words: int = 1024
    """K-block of an outer product [words of 4 bytes]: a panel's block stays in a cache while weight rows stream past
    (Zen 5: 0.67 to 0.74 times torch at 512 tokens, 2026-11-22)."""
    outer_prefetch_bytes: int = 1024
    """Prefetch distance in each row of an outer product [bytes]: 16 tokens 19 to 27-30 GB/s (Zen 5, 2026-11-22)."""
    outer_unroll: int = 4
    """Steps of a loop turn of an outer product: 0.96 to 0.98 times torch (Zen 5, 2026-11-22)."""

    amx_few_tokens: int = 64
    """Tokens, at most, that are memory-bound in tile registers (Emerald Rapids, 2026-11-22)."""
    amx_k_words_few: int = 2048
    """K-block of few tokens [words]: long runs of weights (Emerald Rapids, 2026-11-22)."""
    amx_k_words_many: int = 512
    """K-block of many tokens [words], copied to scratch: 0.87 to 1.03, then 1.15 to 1.43 times torch (2026-11-22)."""
    amx_prefetch_bytes: int = 1024
    """Prefetch distance along a weight row [bytes], some sixteen steps (Emerald Rapids, 2026-11-22)."""
    amx_prefetch_panels: int = 4
    """Panels of many tokens that prefetch the next K-block (Emerald Rapids, 2026-11-22)."""
    amx_prefetch_rows: int = 8
    """Rows of every 32 that each of these panels prefetches (Emerald Rapids, 2026-11-22)."""
    amx_row_tokens: int = 2
    """Tokens in rows, alone or beside packed ones: 0.94 against 0.90 of plain reads for one (2026-11-22)."""
    amx_packed_tokens: int = 32
    """Tokens up to which all are packed: 32 to 33 tokens cost 1.46 times, 1.21 and 1.26 so (2026-11-22)."""

    memory_bound_task_rows: int = 1024
    """Weight rows of a task of few tokens: every task starts a new stream of reads (Zen 5 and Intel, 2026-11-22)."""
    decoded_k: int = 512
    """Weights of a row that are decoded for many tokens before these are multiplied."""
    task_rows: int = 128
    """Weight rows of a task of many tokens: 32 to 128 rows 0.74 to 0.96 times torch at 512 (Zen 5, 2026-11-22)."""
    short_task_tokens: int = 48
    """Up to so many tokens (from 17 on) a task has 32 rows: one panel (Zen 5, 2026-11-22)."""
    short_task_tokens_whole_rows: int = 64
    """The same for bf16 pairs in whole rows: two panels on 128 rows took 1.2 times as long (Intel, 2026-11-23)."""
    tasks_per_thread: int = 2
    """Tasks of a thread, at least, where the rows allow (Zen 5 and Intel, 2026-11-22)."""
    min_task_rows: int = 8
    """Rows of the last tasks, where rows are independent (Zen 3 and Intel, 2026-11-23)."""


_ZEN5 = Tuning("zen5", weights_prefetch_level=NON_TEMPORAL, k_blocked=True)
_INTEL = Tuning("intel", weights_prefetch_level=1, k_blocked=False)
TUNINGS = {
    row.name: row
    for row in (
        replace(_ZEN5, name="zen3"),
        replace(_ZEN5, name="zen4", weights_prefetch_level=2),
        replace(_ZEN5, int8_packed=True),
        _INTEL,
        replace(_INTEL, name="intel_amx"),
        replace(_INTEL, name="portable"),
    )
}
"""The rows by name. A CPU without bf16 pairs or tile registers never reads the fields of these."""

_FAMILIES = {
    "znver1": "zen3",
    "znver2": "zen3",
    "znver3": "zen3",
    "znver4": "zen4",
    "znver5": "zen5",
    **dict.fromkeys(
        ("haswell", "broadwell", "skylake", "skylake-avx512", "cascadelake", "cooperlake", "cannonlake"), "intel"
    ),
    **dict.fromkeys(("icelake-client", "icelake-server", "tigerlake", "rocketlake", "alderlake"), "intel"),
    **dict.fromkeys(("raptorlake", "meteorlake", "arrowlake", "lunarlake", "sierraforest"), "intel"),
    **dict.fromkeys(("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"), "intel_amx"),
}
"""LLVM's CPU names -> rows. LLVM calls a CPU that it does not know "generic", which is no family."""


def family_of(name: str) -> str | None:
    """The row of a CPU's family; None for a CPU that is in no family."""
    return _FAMILIES.get(name)


@cache
def current_tuning() -> Tuning:
    """The row for this process: of the environment's FIDDLER_TUNING, a stored fit, or the CPU's family; or "portable".

    Raises RequestError where FIDDLER_TUNING names no row.
    """
    name = os.environ.get("FIDDLER_TUNING") or _stored().get(_key()) or family_of(cpu_name()) or "portable"
    if name not in TUNINGS:
        raise RequestError(f"FIDDLER_TUNING is {name!r}; there are {', '.join(TUNINGS)}")
    return TUNINGS[name]


def tuning_source() -> str:
    """Where the current row comes from: "FIDDLER_TUNING", "fitted", "table", or "default" for an unknown CPU."""
    if os.environ.get("FIDDLER_TUNING"):
        return "FIDDLER_TUNING"
    if _key() in _stored():
        return "fitted"
    return "table" if family_of(cpu_name()) else "default"


def is_fitted() -> bool:
    """Whether this CPU has a row: by its family, a stored fit or the environment."""
    return tuning_source() != "default"


def store_tuning(row: Tuning) -> None:
    """Use a row for this CPU from now on, in this process and later ones. Raises OSError where it cannot be stored.

    The file is replaced as a whole: where that fails, the earlier one stays.
    """
    _write(json.dumps(_stored() | {_key(): row.name}, indent=1), tuning_store())
    current_tuning.cache_clear()


def check_store() -> None:
    """Raise OSError where `store_tuning` could store nothing."""
    _write(" " * 4096, None)


def tuning_store() -> Path:
    """The file of stored fits: $XDG_CACHE_HOME/fiddler/tuning.json, or that under ~/.cache; of no user, /.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiddler" / "tuning.json"
    except RuntimeError:  # a user that the system does not know, without HOME, as in containers
        return Path("/.cache/fiddler/tuning.json")


def damaged_store() -> bool:
    """Whether the file of stored fits is there and cannot be read as such; its content counts for nothing then."""
    return _read() is None


def _write(text: str, target: Path | None) -> None:
    """Write a new file beside the stored fits, which becomes `target`; for None, and where that fails, it is removed.

    A file of its own small way: this room imports none that writes files.
    """
    path = tuning_store()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target is not None:
            part.replace(target.resolve())  # a link stays
    finally:
        part.unlink(missing_ok=True)


def _key() -> str:
    """CPU, instructions and table that a stored fit holds for: rows of another table were not compared with it."""
    table = hashlib.sha256(repr(TUNINGS).encode()).hexdigest()[:8]
    return f"{cpu_name()}, {cpu_model()}, {choose_tier().name}, rows {table}"


def _stored() -> dict[str, str]:
    """Keys -> rows that `store_tuning` stored; nothing where the file is missing or damaged."""
    return {key: row for key, row in (_read() or {}).items() if row in TUNINGS}


def _read() -> dict[str, str] | None:
    """The stored file's content; None where it is damaged."""
    try:
        found = json.loads(read_regular(tuning_store(), _LARGEST_STORE))
    except (FileNotFoundError, NotADirectoryError):  # the latter where $XDG_CACHE_HOME is a file
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(row, str) for row in found.values()):
        return None
    return found

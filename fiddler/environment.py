"""Environment variables that compiler, threads and progress bars read: nonsense is refused before any of them starts.

Numba answers a value that it cannot read with a traceback and its default, LLVM by ending the process, OpenMP with a
line of its own, and tqdm cannot be imported. Knows names and values; imports nothing heavy. `FIDDLER_KERNEL` and
`FIDDLER_TUNING` are checked where the tiers and the tuning rows are known, in `fiddler.kernels.machine`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from fiddler.errors import RequestError, quoted

__all__ = ["check_environment"]

_LAYERS = ("default", "safe", "threadsafe", "forksafe", "omp", "tbb", "workqueue")
_POOLS = {"omp", "tbb", "workqueue"}
_WHOLE = re.compile(r"\s*[+-]?\d+(_\d+)*\s*", re.ASCII)  # what Python's int() reads
_ZERO = re.compile(r"\s*[+-]?0+\s*", re.ASCII)
_FEATURES = re.compile(r"([+-][\w.-]+(,[+-][\w.-]+)*)?", re.ASCII)
_STACK = re.compile(r"\s*\d+\s*[bkmg]?\s*", re.ASCII | re.IGNORECASE)

_CPU_NAMES = """generic x86-64 x86-64-v2 x86-64-v3 x86-64-v4 nocona core2 penryn bonnell atom silvermont slm goldmont
    goldmont-plus tremont nehalem corei7 westmere sandybridge corei7-avx ivybridge core-avx-i haswell core-avx2
    broadwell skylake skx skylake-avx512 cascadelake cooperlake cannonlake icelake-client icelake-server rocketlake
    tigerlake sapphirerapids alderlake knl knm k8 opteron athlon64 athlon-fx k8-sse3 opteron-sse3 athlon64-sse3
    amdfam10 barcelona btver1 btver2 bdver1 bdver2 bdver3 bdver4 znver1 znver2 znver3"""
"""LLVM's names of x86-64 CPUs (llvm/lib/TargetParser/X86TargetParser.cpp) that Numba's LLVMs know, from 15 on."""

_LLVM_20_CPU_NAMES = """raptorlake meteorlake arrowlake arrowlake-s lunarlake gracemont sierraforest grandridge
    graniterapids graniterapids-d emeraldrapids clearwaterforest pantherlake diamondrapids znver4 znver5"""
"""Those that LLVM 20 knows and 15 does not; no Numba has an LLVM between them."""

_Rule = tuple[Callable[[str], bool], str]


def _whole(least: int) -> Callable[[str], bool]:
    return lambda value: bool(_WHOLE.fullmatch(value)) and len(value) < 19 and int(value) >= least


def _counts(value: str) -> bool:
    return all(_whole(1)(count) for count in value.split(","))


def _is_cpu(value: str) -> bool:
    """Whether Numba's LLVM knows an x86-64 CPU of this name; it answers others with thousands of lines."""
    if os.uname().machine != "x86_64" or value in {"", *_CPU_NAMES.split()}:
        return True
    return value in _LLVM_20_CPU_NAMES.split() and _llvm_version() >= 20


def _llvm_version() -> int:
    from llvmlite.binding import llvm_version_info  # loads LLVM: some 50 ms

    return int(llvm_version_info[0])


def _like(pattern: str) -> Callable[[str], bool]:
    """Whether a value is of a form, in small letters or large ones, with blanks around it."""
    form = re.compile(rf"\s*({pattern})\s*", re.ASCII | re.IGNORECASE)
    return lambda value: len(value) < 4096 and bool(form.fullmatch(value))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


_POSITIVE: _Rule = (_whole(1), "a number from 1")
_BOOLEAN: _Rule = (_like("true|false"), "true or false")
_RULES: Mapping[str, _Rule] = {
    "FIDDLER_STREAM_WAITS": (lambda value: value in ("0", "1"), "1 or 0"),
    "NUMBA_DISABLE_JIT": (lambda value: bool(_ZERO.fullmatch(value)), "0: kernels are compiled"),
    "NUMBA_NUM_THREADS": _POSITIVE,
    "NUMBA_THREADING_LAYER": (lambda value: value.lower() in _LAYERS, f"one of {', '.join(_LAYERS)}"),
    "NUMBA_THREADING_LAYER_PRIORITY": (
        lambda value: len(value.split()) == 3 and set(value.split()) == _POOLS,
        "tbb, omp and workqueue in some order, with spaces between them",
    ),
    "NUMBA_OPT": (lambda value: value in ("0", "1", "2", "3", "max"), "0, 1, 2, 3 or max"),
    "NUMBA_CPU_NAME": (_is_cpu, "a name that Numba's LLVM knows, as znver3"),
    "NUMBA_CPU_FEATURES": (lambda value: bool(_FEATURES.fullmatch(value)), "LLVM's, as +avx2,-avx512f"),
    "OMP_NUM_THREADS": (_counts, "a number from 1"),
    "OMP_THREAD_LIMIT": _POSITIVE,
    "OMP_STACKSIZE": (lambda value: bool(_STACK.fullmatch(value)), "a size in KiB, as 4096 or 4M"),
    "GOMP_STACKSIZE": (lambda value: bool(_STACK.fullmatch(value)), "a size in KiB, as 4096 or 4M"),
    "OMP_MAX_ACTIVE_LEVELS": (_whole(0), "a whole number"),
    "OMP_NESTED": _BOOLEAN,
    "OMP_DYNAMIC": _BOOLEAN,
    "OMP_CANCELLATION": _BOOLEAN,
    "OMP_DISPLAY_AFFINITY": _BOOLEAN,
    "OMP_DISPLAY_ENV": (_like("true|1|false|0|verbose"), "true, false or verbose"),
    "OMP_WAIT_POLICY": (_like("active|passive"), "active or passive"),
    "OMP_PROC_BIND": (
        _like(r"true|false|(master|primary|close|spread)(\s*,\s*(master|primary|close|spread))*"),
        "true, false, close or spread",
    ),
    "OMP_SCHEDULE": (
        _like(r"((non)?monotonic\s*:\s*)?(static|dynamic|guided|auto)(\s*,\s*\d{1,9})?"),
        "static, dynamic, guided or auto",
    ),
    "GOMP_SPINCOUNT": (_like(r"\d{1,18}\s*[kmgt]?|infinite|infinity"), "a number, or infinity"),
    "GOMP_CPU_AFFINITY": (
        _like(r"\d{1,9}(-\d{1,9}(:\d{1,9})?)?([\s,]+\d{1,9}(-\d{1,9}(:\d{1,9})?)?)*"),
        "CPUs, as 0 3 4-7",
    ),
    "OMP_PLACES": (
        _like(r"(threads|cores|sockets|ll_caches|numa_domains)(\s*\(\s*\d{1,9}\s*\))?|[{!\d][-\d{}!:,\s]*"),
        "threads, cores, sockets, or places as {0:4},{4:4}",
    ),
}

_SWITCHES = """BOUNDSCHECK ALWAYS_WARN_UNINIT_VAR DEBUG DEBUG_ARRAY_OPT DEBUG_ARRAY_OPT_RUNTIME DEBUG_ARRAY_OPT_STATS
    DEBUG_CACHE DEBUG_FRONTEND DEBUG_INLINE_CLOSURE DEBUG_JIT DEBUG_NRT DEBUG_NRT_STACK_LIMIT DEBUG_TYPEINFER DEBUGINFO
    DEVELOPER_MODE DIFF_IR DISABLE_CUDA DISABLE_INTEL_SVML DISABLE_PERFORMANCE_WARNINGS DISABLE_TYPEINFER_FAIL_CACHE
    DUMP_ANNOTATION DUMP_ASSEMBLY DUMP_BYTECODE DUMP_CFG DUMP_FUNC_OPT DUMP_IR DUMP_LLVM DUMP_OPTIMIZED DUMP_SSA
    ENABLE_AVX ENABLE_CUDASIM ENABLE_PROFILING ENABLE_SYS_MONITORING EXTEND_VARIABLE_LIFETIMES FULL_TRACEBACKS
    FUNCTION_CACHE_SIZE HIGHLIGHT_DUMPS LLVM_REFPRUNE_PASS LOOP_VECTORIZE NRT_STATS PARALLEL_DIAGNOSTICS
    PARFOR_MAX_TUPLE_SIZE SHOW_HELP SLP_VECTORIZE TRACE"""
"""Numba's whole numbers that nothing here depends on; it answers others than numbers with a traceback."""

_BAR_NUMBERS = ("DELAY", "MAXINTERVAL", "MININTERVAL", "MINITERS", "SMOOTHING", "TOTAL")
_BAR_COUNTS = ("INITIAL", "NCOLS", "NROWS", "POSITION", "UNIT_DIVISOR")
"""Settings of progress bars: tqdm cannot be imported where they are no numbers (`envwrap` in tqdm/utils.py)."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RequestError, one line that names the variable, where a value makes no sense.

    Sources: Numba's reference of environment variables; OpenMP 5.2, chapter 21.
    """
    whole: _Rule = (_whole(-(1 << 31)), "a whole number")
    rules = dict(_RULES) | {f"NUMBA_{switch}": whole for switch in _SWITCHES.split()}
    rules |= {f"TQDM_{name}": whole for name in _BAR_COUNTS} | {
        f"TQDM_{name}": (_is_number, "a number") for name in _BAR_NUMBERS
    }
    for name, (fits, allowed) in rules.items():
        value = environment.get(name)
        if value is not None and not fits(value):
            raise RequestError(f"{name} is {quoted(value)} in the environment; unset it, or give {allowed}")

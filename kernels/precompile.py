"""Compiles a variant's kernels before their first use, or reads them from the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from numba.core import event

from fiddler.errors import quoted
from fiddler.kernels.attention import attend_each
from fiddler.kernels.codegen.jit import cached_on_disk
from fiddler.kernels.codegen.kernel_cache import take_write_failure
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.decode_step import compile_decode
from fiddler.kernels.kv_rows import head_dim_of, row_length
from fiddler.kernels.machine.isa import choose_tier
from fiddler.kernels.machine.threads import check_process, end_with_parent, thread_count, usable_cores
from fiddler.kernels.machine.tuning import TUNINGS
from fiddler.kernels.matmul.blocks import stored_as
from fiddler.kernels.matmul.grouped import addresses, compile_grouped_products
from fiddler.kernels.norm_router import rms_norm, route

__all__ = ["COMPILING", "compile_for_parent", "precompile"]

_HELPER_TIMEOUT = 120  # how much longer the helper process may take than this one [s]
_UNCACHED = "every start compiles them again; make room there, or set NUMBA_CACHE_DIR to another folder"


class _FirstCompilation(event.Listener):
    """Calls back once, when Numba begins its first compilation."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def on_start(self, event: object) -> None:
        """Implements `Listener.on_start`."""
        if self._callback is not None:
            callback, self._callback = self._callback, None
            callback()

    def on_end(self, event: object) -> None:
        """Implements `Listener.on_end`."""


def precompile(
    variants: KernelVariant | Collection[KernelVariant],
    notify: Callable[[str], None] | None = None,
    decode: bool = False,
    kv_dtype: np.dtype | None = None,
) -> None:
    """Compile the kernels of these variants, attention, norm and router, or read them from the cache.

    Takes seconds the first time, then a moment. A helper process compiles half of them, where it has a core.
    notify: called with one line if anything must be compiled, and with a warning where that cannot be cached. decode:
    also compile `CompiledDecodeStep.step`. kv_dtype: of the KV cache, see `row_length`; None: as exact as activations.
    Raises RequestError where Numba has no threading layer of the environment's choice, or in a forked process.
    """
    if isinstance(variants, KernelVariant):
        variants = [variants]
    variants = sorted(set(variants), key=repr)
    if not variants:
        return
    check_process()
    thread_count()  # starts the threading layer: loading a parallel kernel fails without one
    compiled: list[bool] = []

    def on_compile() -> None:
        compiled.append(True)
        if notify is not None:
            notify(COMPILING if cached_on_disk() else COMPILING.partition(";")[0])

    with event.install_listener("numba:compile", _FirstCompilation(on_compile)):
        with _with_helper(variants, decode, kv_dtype):
            _compile_first_half(variants, kv_dtype)
        _compile_second_half(variants, decode, kv_dtype)
    if notify is None:
        return
    failure = take_write_failure()
    if failure is not None:
        notify(f"warning: kernels cannot be cached in {quoted(failure.filename, 300)}: {failure.strerror}; {_UNCACHED}")
    elif compiled and not cached_on_disk():
        notify(f"warning: kernels cannot be cached: no folder for them can be written; {_UNCACHED}")


def _compile_first_half(variants: Sequence[KernelVariant], kv_dtype: np.dtype | None) -> None:
    for grouping in _groupings(variants):
        compile_grouped_products(grouping)
        kind = kv_dtype or _kv_dtype(grouping)
        x = np.zeros((1, 1, head_dim_of(kind)), np.float32)
        pool = np.zeros((1, 1, 2, 1, 1, row_length(kind, x.size)), kind)
        attend_each(x, x, x, pool, 0, [np.zeros(1, np.int64)], [0], x[0, 0, : x.size // 2])
    route(rms_norm(x[0], x[0, 0], 1.0), x[0], 1)
    for variant in variants[1::2]:
        stored_as(variant, 0)


def _compile_second_half(variants: Sequence[KernelVariant], decode: bool, kv_dtype: np.dtype | None) -> None:
    for grouping in _groupings(variants):
        addresses(grouping)
        if decode:
            compile_decode(grouping, kv_dtype or _kv_dtype(grouping))
    for variant in (*variants[::2], *variants[1::2]):  # the last ones are in the cache
        stored_as(variant, 0)


def _groupings(variants: Sequence[KernelVariant]) -> list[KernelVariant]:
    return sorted({variant.grouping for variant in variants}, key=repr)


def _kv_dtype(variant: KernelVariant) -> np.dtype:
    """The KV cache's type beside this variant."""
    return np.dtype(np.float32 if variant.activations == "f32" else np.uint16)


@contextmanager
def _with_helper(variants: Sequence[KernelVariant], decode: bool, kv_dtype: np.dtype | None) -> Iterator[None]:
    """Start a helper process at the first compilation inside the context; it compiles the second half into the cache.

    This process compiles whatever the helper did not, for any reason.
    """
    with (
        ExitStack() as helpers,
        event.install_listener(
            "numba:compile",
            _FirstCompilation(lambda: helpers.enter_context(_helper_process(variants, decode, kv_dtype))),
        ),
    ):
        yield


@contextmanager
def _helper_process(variants: Sequence[KernelVariant], decode: bool, kv_dtype: np.dtype | None) -> Iterator[None]:
    """Compile the second half in another process, where a core is free; it has ended when the context ends."""
    process = None
    if cached_on_disk() and usable_cores() > 1 and sys.executable:
        names = [(each.tier.name, each.weights, each.activations, each.tuning.name) for each in variants]
        arguments = os.getpid(), names, decode, None if kv_dtype is None else kv_dtype.name
        package = sys.modules[
            __name__.partition(".")[0]
        ]  # first: the cache is by file, and the current folder may have it
        own = str(Path(str(package.__file__)).absolute().parents[1])
        paths = os.pathsep.join([own, *(path for path in sys.path if isinstance(path, str) and path)])
        with suppress(OSError):
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    f"from fiddler.kernels.precompile import compile_for_parent; compile_for_parent{arguments}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
    try:
        yield
        if process is not None:
            process.wait(_HELPER_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process is not None:
            process.kill()
            process.wait()


def compile_for_parent(
    parent: int, names: Sequence[tuple[str, str, str, str]], decode: bool, kv_name: str | None
) -> None:
    """The helper process's half of `precompile`. It ends when its parent does, however that ends.

    names: of each variant's tier, weights, activations and tuning. kv_name: of the KV cache's type.
    """
    end_with_parent(parent)
    kv_dtype = None if kv_name is None else np.dtype(kv_name)
    variants = [
        KernelVariant(choose_tier(tier), weights, activations, TUNINGS[tuning])
        for tier, weights, activations, tuning in names
    ]
    for variant in variants[::2]:  # the parent begins with the others
        stored_as(variant, 0)
    for grouping in _groupings(variants):
        addresses(grouping)
        if decode:
            compile_decode(grouping, kv_dtype or _kv_dtype(grouping))


COMPILING = "compiling kernels for this CPU; the next start finds them on disk"

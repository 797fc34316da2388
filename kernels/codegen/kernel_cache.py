"""Machine code of one kernel on disk: a file for each signature, whose checksum is compared before any of it is used.

Numba's own cache writes an index and numbered files. A flipped bit, or two processes that compile at the same time, can
leave an index that names the wrong code, and Numba would run it. Here each entry is one file, named after its key, and
its checksum covers key and code. Knows Numba's interface to a cache; nothing of kernels.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from contextlib import suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

__all__ = ["SOURCES", "KernelCache", "take_write_failure"]

_SETTINGS = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DISABLE_INTEL_SVML", "DEBUGINFO_DEFAULT")
"""Numba's settings (`NUMBA_OPT` and so on) that change the code. Numba's own key has none of them."""

_DIGEST_BYTES = 32


def _digest_of_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCES = _digest_of_sources(Path(__file__).parents[1])
"""A digest of all kernels' sources: Numba compares the file of a function alone, but a kernel consists of several."""

_write_failures: list[OSError] = []
_unreported: list[OSError] = []


def take_write_failure() -> OSError | None:
    """Why an entry could not be written, the first time; from then on this process writes none. None: no news."""
    return _unreported.pop() if _unreported else None


class KernelCache(FunctionCache):
    """The cache of one kernel; replaces the `FunctionCache` of Numba's dispatcher.

    Raises RuntimeError where no folder for the cache can be written.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for the signature `sig`; None where there is none. A damaged entry is removed."""
        target_context.refresh()
        key = self._key(sig, target_context.codegen())
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:  # not there, or not for this user
            return None
        digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != _digest(key, code):
            _remove(path)
            return None
        try:
            reduced = pickle.loads(code)
        except (AttributeError, ImportError):  # written by sources in which a class had another name
            _remove(path)
            return None
        return self._impl.rebuild(target_context, reduced)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the code `data` for the signature `sig`, unless a write has failed before in this process."""
        if _write_failures or not self._impl.check_cachable(data):
            return
        key, code = self._key(sig, data.codegen), dumps(self._impl.reduce(data))
        path = self._path(key)
        try:
            self._impl.locator.ensure_cache_path()
            _write(path, _digest(key, code) + code)
        except OSError as error:
            failure = OSError(error.errno, error.strerror or str(error), str(path.parent))
            _write_failures.append(failure)
            _unreported.append(failure)
            return
        self._remove_stale()

    def flush(self) -> None:
        """Remove every entry of this kernel."""
        for path in self._files():
            _remove(path)

    def _key(self, sig: Any, codegen: Any) -> str:
        """All that the code depends on: versions, source, signature, CPU, bytecode and closure, compiler settings."""
        settings = [str(getattr(config, name, None)) for name in _SETTINGS]
        versions = numba.__version__, llvmlite.__version__
        return repr((versions, self._stamp(), self._index_key(sig, codegen), settings))

    def _stamp(self) -> str:
        """A name for this state of the source file, and of those that it imports.

        Not Numba's own stamp: releases have different ones, and two of them would remove each other's entries.
        """
        return _name(repr((_digest_of_file(self._py_func.__code__.co_filename), SOURCES)))

    def _path(self, key: str) -> Path:
        return Path(self._cache_path) / f"{self._impl.filename_base}.{self._stamp()}-{_name(key)}.nbc"

    def _files(self) -> list[Path]:
        """The files of this kernel, of any state of its source, with this Python. A base is `NAME-LINE.PYTHON`."""
        name, _, rest = self._impl.filename_base.rpartition("-")
        python = rest.partition(".")[2]
        return list(Path(self._cache_path).glob(f"{escape(name)}-*.{python}.*"))

    def _remove_stale(self) -> None:
        """Remove entries of earlier states of the sources."""
        current = f"{self._impl.filename_base}.{self._stamp()}-"
        for path in self._files():
            if not path.name.startswith(current):
                _remove(path)


@cache
def _digest_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; a kill leaves nothing where the file system has unnamed files."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except (AttributeError, OSError):  # not on this system, or not on this file system
        _write_beside(path, data)
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        try:
            _link(descriptor, path)
        except FileExistsError:  # of another process that compiled the same, or a file that cannot be read
            part = _part(path)
            _link(descriptor, part)
            _replace(part, path)


def _link(descriptor: int, path: Path) -> None:
    """Give an unnamed file a name. `src_dir_fd` makes Python call linkat(2), which follows /proc's link to the file."""
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def _write_beside(path: Path, data: bytes) -> None:
    part = _part(path)
    try:
        part.write_bytes(data)
    except OSError:
        _remove(part)
        raise
    _replace(part, path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _replace(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    except OSError:
        _remove(part)
        raise

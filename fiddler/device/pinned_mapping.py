"""Pins a mapped file for the GPU's copy engine, in a thread of its own that starts before torch is imported.

Pinning and the import both take seconds: four to seven for 90 GB. Knows addresses, bytes and the driver; not the
file's content.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from fiddler.device import cuda_driver
from fiddler.errors import ResourceError
from fiddler.host_memory import available_memory, cached_bytes, in_memory, populate

__all__ = ["PinnedMapping", "pieces", "torch_for_gpus"]

_SPARE = 0.05  # fraction of the available memory that stays unpinned
_THREADS = 8  # that enter the mapping's pages: faster than one thread, 1.5 instead of 6.6 s for 93 GB
_POPULATED_BYTES = 1 << 27  # that one of them enters at a time; whole pages
_PINNED_BYTES = 1 << 31  # that one call pins: nothing else in the process can be mapped meanwhile


class PinnedMapping:
    """A mapping that a thread pins, and that is unpinned with the last reference to this object."""

    def __init__(self, mappings: Sequence[tuple[int, int]], path: Path | None, owner: object) -> None:
        """Start pinning. mappings: page address and bytes of each; `owner` keeps them alive. path: of the file, if any.

        Pins piece by piece: a single copy must not cross one of the `borders`.
        """
        self.borders = sorted(begin for begin, _ in pieces(mappings, _PINNED_BYTES))
        self._pinning = _Pinning(mappings, path)
        thread = threading.Thread(target=self._pinning.run, name="fiddler-pinning", daemon=True)
        thread.start()
        # before it is unmapped: the driver does not notice that, and would fail at the next mapping of that address
        weakref.finalize(self, _unpin, thread, self._pinning, owner).atexit = False

    def counted(self) -> None:
        """Wait until the GPU's used memory is read: pinning makes the driver itself use some."""
        self._pinning.counted.wait()

    def wait(self) -> None:
        """Wait until all is pinned. Raises ResourceError, with the reason, where weights must be copied otherwise."""
        self._pinning.ended.wait()
        if self._pinning.error is not None:
            raise ResourceError(self._pinning.error)


class _Pinning:
    """The thread's work. It must not hold its `PinnedMapping`: that would never be freed."""

    def __init__(self, mappings: Sequence[tuple[int, int]], path: Path | None) -> None:
        self._mappings, self._path = mappings, path
        self.counted, self.ended = threading.Event(), threading.Event()
        self.error: str | None = None
        self.pinned: list[int] = []  # addresses
        self.cancelled = False

    def run(self) -> None:
        try:
            cuda_driver.used_at_first()
            self.counted.set()
            self._pin()
        except Exception as error:  # noqa: BLE001 - of the driver's library; `wait` raises it
            self.error = str(error) or type(error).__name__
        finally:
            self.counted.set()
            self.ended.set()

    def _pin(self) -> None:
        nbytes = sum(size for _, size in self._mappings)
        available = available_memory()
        if nbytes > available * (1 - _SPARE) and in_memory(self._path):
            available += sum(self._on_all_pieces(cached_bytes))  # ours already, and not counted as available
        if nbytes > available * (1 - _SPARE):
            raise ResourceError(
                f"the model's {nbytes / 2**30:.2f} GiB exceed the memory ({available / 2**30:.2f} GiB available)"
            )
        cuda_driver.start()
        self._on_all_pieces(populate)
        for address, size in pieces(self._mappings, _PINNED_BYTES):
            if self.cancelled:
                return
            if not cuda_driver.pin(address, size):
                raise ResourceError("the driver refuses to pin the mapped file (no pinned memory allowed?)")
            self.pinned.append(address)

    def _on_all_pieces(self, do: Callable[[int, int], int]) -> list[int]:
        """Call `do(address, nbytes)` for every piece of the mappings, on several threads; its results, in any order."""
        remaining, results = iter(pieces(self._mappings, _POPULATED_BYTES)), list[int]()

        def process_pieces() -> None:
            for piece in remaining:
                if self.cancelled:
                    return
                results.append(do(*piece))

        # daemons: at its end the interpreter would wait for an executor's threads
        threads = [threading.Thread(target=process_pieces, daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def pieces(mappings: Sequence[tuple[int, int]], max_bytes: int) -> list[tuple[int, int]]:
    """Split mappings (address and bytes of each) into pieces of at most `max_bytes`."""
    return [
        (address + begin, min(max_bytes, size - begin))
        for address, size in mappings
        for begin in range(0, size, max_bytes)
    ]


def _unpin(thread: threading.Thread, pinning: _Pinning, owner: object) -> None:
    pinning.cancelled = True
    thread.join()
    for address in pinning.pinned:
        cuda_driver.unpin(address)


def torch_for_gpus() -> bool:
    """Whether the installed torch is built for NVIDIA's GPUs; does not import it."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())

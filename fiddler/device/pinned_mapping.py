"""Makes a mapped file readable by the GPU's copy engine, in a thread of its own, begun before torch is imported.

Both take seconds, for 90 GB four to seven. Knows addresses, bytes and the driver; not what the file holds.
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

_SPARE = 0.05  # of memory that is left unpinned
_THREADS = 8  # that walk the mapping: more than one gets its pages faster, 1.5 instead of 6.6 s for 93 GB
_WALKED = 1 << 27  # bytes, that one of them takes at a time; whole pages
_PIECE = 1 << 31  # bytes, that are registered at a time: nothing else in the process can be mapped meanwhile


class PinnedMapping:
    """A mapping that is being registered with the driver, and is unregistered when nobody holds this any more."""

    def __init__(self, mappings: Sequence[tuple[int, int]], path: Path | None, owner: object) -> None:
        """Begin. mappings: address, of a page, and bytes; `owner` keeps them alive. path: of the file, if it is one.

        They are registered in pieces: a copy must not go past one of the `borders`.
        """
        self.borders = sorted(begin for begin, _ in pieces(mappings, _PIECE))
        self._work = _Work(mappings, path)
        thread = threading.Thread(target=self._work.run, name="fiddler-registration", daemon=True)
        thread.start()
        # before the mapping goes: the driver does not notice, and would stumble over the next one at that address
        weakref.finalize(self, _undo, thread, self._work, owner).atexit = False

    def counted(self) -> None:
        """Wait until it is known what the GPU's memory was used for before; the driver takes some itself then."""
        self._work.counted.wait()

    def wait(self) -> None:
        """Wait for the end. Raises ResourceError, with the reason, where weights must be read in another way."""
        self._work.ended.wait()
        if self._work.refused is not None:
            raise ResourceError(self._work.refused)


class _Work:
    """What the thread does, which must not keep its `PinnedMapping` alive."""

    def __init__(self, mappings: Sequence[tuple[int, int]], path: Path | None) -> None:
        self._mappings, self._path = mappings, path
        self.counted, self.ended = threading.Event(), threading.Event()
        self.refused: str | None = None
        self.done: list[int] = []
        self.unwanted = False  # nobody waits for it any more

    def run(self) -> None:
        try:
            cuda_driver.used_at_first()
            self.counted.set()
            self._register()
        except Exception as error:  # noqa: BLE001 - of the driver's library; told in `wait`
            self.refused = str(error) or type(error).__name__
        finally:
            self.counted.set()
            self.ended.set()

    def _register(self) -> None:
        nbytes = sum(size for _, size in self._mappings)
        available = available_memory()
        if nbytes > available * (1 - _SPARE) and in_memory(self._path):
            available += sum(self._all(cached_bytes))  # not counted as available, and ours already
        if nbytes > available * (1 - _SPARE):
            raise ResourceError(
                f"the model's {nbytes / 2**30:.2f} GiB exceed the memory ({available / 2**30:.2f} GiB available)"
            )
        cuda_driver.start()
        self._all(populate)
        for address, size in pieces(self._mappings, _PIECE):
            if self.unwanted:
                return
            if not cuda_driver.pin(address, size):
                raise ResourceError("the driver does not let the GPU read the mapped file (no pinned memory?)")
            self.done.append(address)

    def _all(self, do: Callable[[int, int], int]) -> list[int]:
        """Do something to every piece of the mappings, on several threads."""
        left, found = iter(pieces(self._mappings, _WALKED)), list[int]()

        def work() -> None:
            for piece in left:
                if self.unwanted:
                    return
                found.append(do(*piece))

        # none that the interpreter would wait for at its end, as it does for an executor's
        threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def pieces(mappings: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Mappings, address and bytes each, in pieces of at most so many bytes."""
    return [(address + begin, min(most, size - begin)) for address, size in mappings for begin in range(0, size, most)]


def _undo(thread: threading.Thread, work: _Work, owner: object) -> None:
    work.unwanted = True
    thread.join()
    for address in work.done:
        cuda_driver.unpin(address)


def torch_for_gpus() -> bool:
    """Whether the torch that is installed was built for NVIDIA's GPUs, without importing it."""
    found = find_spec("torch")
    folders = found.submodule_search_locations if found is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())

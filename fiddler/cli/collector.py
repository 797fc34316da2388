"""Pauses Python's cyclic garbage collector while modules are imported. Knows no module."""

from __future__ import annotations

import gc

TYPE_CHECKING = False  # imported before all that takes time, as `interrupts` is
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["CollectorPause"]


class CollectorPause:
    """No cyclic garbage is collected inside this context, and later collections pass over all that it leaves behind.

    Modules of torch and Numba are a third of a million objects that live as long as the process: without the pause,
    collections walk through them four times at the start and once at the exit, a third of the time of a short run.
    What is left behind is freed when nothing refers to it any more; only cycles among it never are.
    """

    def __enter__(self) -> None:
        gc.disable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gc.freeze()
        gc.enable()

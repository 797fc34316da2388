"""Measures what an expert costs on this machine, on either side and over the link, and remembers it.

Knows kernels, the link and a clock; not plans, though `plan.Costs` is what it makes. Everything is measured the way
it will be used: the CPU's kernels while the link is busy, and the link while the CPU computes, since both read the
same memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import inf
from pathlib import Path

from fiddler.offload.plan import Costs, Curve

__all__ = ["Calibration", "cache_folder", "read_calibration", "stored"]

_VERSION = 4  # of what is measured, the kernels included, and how; another one's results are measured again


@dataclass(frozen=True)
class Calibration:
    """Seconds for one whole expert, and what they were measured with."""

    machine: str
    threads: int  # with which the CPU and the link together are fastest, a core being left where there are many
    expert_bytes: int
    cpu_tokens: tuple[int, ...]
    cpu_seconds: tuple[float, ...]  # while the link is busy
    cpu_alone: float  # for one token, while it is not
    gpu_tokens: tuple[int, ...] = ()  # from here on, nothing where there is no GPU
    gpu_seconds: tuple[float, ...] = ()
    copy_seconds: float | None = None  # while the CPU computes
    copy_alone: float | None = None
    version: int = _VERSION

    def costs(self) -> Costs:
        """What `plan` weighs. The memory gives both sides together what it gave them when measured."""
        cpu = Curve(self.cpu_tokens, self.cpu_seconds)
        if self.copy_seconds is None or self.copy_alone is None:
            return Costs(cpu, Curve((1,), (inf,)), inf, 0.0)
        gpu = Curve(self.gpu_tokens, self.gpu_seconds)
        return Costs(cpu, gpu, self.copy_seconds, self._together(), copy_alone=self.copy_alone)

    def copy_speeds(self) -> tuple[float, ...]:
        """Seconds an expert on the link, beside the CPU and alone; none where there is no GPU."""
        given = (self.copy_seconds, self.copy_alone)
        return tuple(seconds for seconds in given if seconds is not None)

    def _together(self) -> float:
        """Seconds an expert, for the CPU and the link together."""
        assert self.copy_seconds is not None
        return 1 / (1 / self.cpu_seconds[0] + 1 / self.copy_seconds)

    def to_text(self) -> str:
        """A few lines for people."""

        def speed(seconds: float) -> str:
            return f"{self.expert_bytes / seconds / 1e9:.1f} GB/s"

        def points(tokens: tuple[int, ...], seconds: tuple[float, ...]) -> str:
            return ", ".join(f"{t}: {s * 1e3:.2f}" for t, s in zip(tokens, seconds, strict=True))

        lines = [self.machine, f"  expert of {self.expert_bytes / 1e6:.1f} MB, {self.threads} threads"]
        lines.append(f"  CPU, one token: {speed(self.cpu_alone)} alone")
        if self.copy_seconds is not None and self.copy_alone is not None:
            lines[-1] += f", {speed(self.cpu_seconds[0])} beside the link"
            beside = f"{speed(self.copy_seconds)} beside the CPU; both {speed(self._together())}"
            lines.append(f"  link: {speed(self.copy_alone)} alone, {beside}")
        lines.append(f"  CPU, ms an expert for tokens: {points(self.cpu_tokens, self.cpu_seconds)}")
        if self.gpu_tokens:
            lines.append(f"  GPU, ms an expert for tokens: {points(self.gpu_tokens, self.gpu_seconds)}")
        return "\n".join(lines)


def cache_folder() -> Path:
    """Where results are kept: $XDG_CACHE_HOME/fiddler, or ~/.cache/fiddler."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiddler"


def stored() -> list[Calibration]:
    """All calibrations that are kept."""
    found = (read_calibration(path) for path in sorted(cache_folder().glob("calibration-*.json")))
    return [calibration for calibration in found if calibration is not None]


def read_calibration(path: Path) -> Calibration | None:
    """None where there is no file, or one that is damaged or of another version."""
    try:
        fields = json.loads(path.read_text())
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        found = Calibration(**{**fields, **lists})
        sound = found.version == _VERSION and all(
            isinstance(s, float) and s > 0
            for s in (*found.cpu_seconds, *found.gpu_seconds, found.cpu_alone, *found.copy_speeds())
        )
        if sound:
            found.costs()
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, LookupError):
        return None
    return found if sound else None

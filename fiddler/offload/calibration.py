"""The measured costs of an expert on this machine, and their cache on disk.

Knows seconds, JSON and the cache folder; not how costs are measured (see `cost_benchmark`) or used (see `plan`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

from fiddler.cost_curve import Curve
from fiddler.errors import FiddlerError, ResourceError
from fiddler.files.atomic_file import check_target, whole_file
from fiddler.input_file import read_regular
from fiddler.kernels.machine.tuning import tuning_store
from fiddler.offload.plan import Costs

__all__ = ["Calibration", "cache_folder", "check_store", "read_calibration", "store", "stored"]

_LARGEST_FILE = 1 << 20  # [bytes]; a calibration takes 1 KB
_LARGEST_COUNT = 1 << 62  # of tokens, threads or bytes
_VERSION = 8  # of the kernels and of how they are measured; results of another version are measured again


@dataclass(frozen=True)
class Calibration:
    """Seconds for one whole expert, and the setup in which they were measured."""

    machine: str
    threads: int  # fastest for the CPU and the copies together; leaves a core free where there are many
    expert_bytes: int
    cpu_tokens: tuple[int, ...]
    cpu_seconds: tuple[float, ...]  # while weights are copied to the GPU
    cpu_alone: tuple[float, ...]  # for the same tokens, without copies
    cpu_split: float  # more, for a part of an expert
    gpu_tokens: tuple[int, ...] = ()  # this and the rest are empty where there is no GPU
    gpu_seconds: tuple[float, ...] = ()
    copy_seconds: float | None = None  # while the CPU computes
    copy_alone: float | None = None
    copy_split: float = 0.0
    version: int = _VERSION

    def costs(self) -> Costs:
        """The costs for `plan`. Those of the memory follow from both sides measured together."""
        cpu, cpu_alone = Curve(self.cpu_tokens, self.cpu_seconds), Curve(self.cpu_tokens, self.cpu_alone)
        if self.copy_seconds is None or self.copy_alone is None:
            return Costs(cpu, Curve((1,), (inf,)), inf, 0.0, cpu_alone=cpu_alone, cpu_split=self.cpu_split)
        gpu = Curve(self.gpu_tokens, self.gpu_seconds)
        return Costs(
            *(cpu, gpu, self.copy_seconds, self._together()),
            copy_alone=self.copy_alone,
            cpu_alone=cpu_alone,
            cpu_split=self.cpu_split,
            copy_split=self.copy_split,
        )

    def copy_speeds(self) -> tuple[float, ...]:
        """Seconds to copy an expert, while the CPU computes and alone; empty where there is no GPU."""
        measured = (self.copy_seconds, self.copy_alone)
        return tuple(seconds for seconds in measured if seconds is not None)

    def _together(self) -> float:
        """Seconds an expert, for the CPU and the copies together."""
        assert self.copy_seconds is not None
        return 1 / (1 / self.cpu_seconds[0] + 1 / self.copy_seconds)

    def to_text(self) -> str:
        """A summary in a few lines."""

        def speed(seconds: float) -> str:
            return f"{self.expert_bytes / seconds / 1e9:.1f} GB/s"

        def points(tokens: tuple[int, ...], seconds: tuple[float, ...]) -> str:
            return ", ".join(f"{t}: {s * 1e3:.2f}" for t, s in zip(tokens, seconds, strict=True))

        lines = [self.machine, f"  expert of {self.expert_bytes / 1e6:.1f} MB, {self.threads} threads"]
        lines.append(f"  CPU, one token: {speed(self.cpu_alone[0])} alone")
        if self.copy_seconds is not None and self.copy_alone is not None:
            lines[-1] += f", {speed(self.cpu_seconds[0])} during PCIe copies"
            beside = f"{speed(self.copy_seconds)} while the CPU computes; both {speed(self._together())}"
            lines.append(f"  PCIe copies: {speed(self.copy_alone)} alone, {beside}")
            more = f"{self.cpu_split * 1e6:.0f} us more on the CPU, {self.copy_split * 1e6:.0f} us for its copy"
            lines.append(f"  a part of an expert: {more}")
        lines.append(f"  CPU, ms an expert for tokens: {points(self.cpu_tokens, self.cpu_seconds)}")
        if self.gpu_tokens:
            lines.append(f"  GPU, ms an expert for tokens: {points(self.gpu_tokens, self.gpu_seconds)}")
        return "\n".join(lines)


def cache_folder() -> Path:
    """The folder of cached calibrations: $XDG_CACHE_HOME/fiddler, or ~/.cache/fiddler, beside the kernels' settings."""
    return tuning_store().parent


def check_store(path: Path) -> None:
    """Raise ResourceError, which names the file, where `store` could not write it."""
    with _errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_target(path, force=True)


def store(calibration: Calibration, path: Path) -> None:
    """Write a calibration to the cache, all or nothing. Raises ResourceError, which names the file."""
    check_store(path)
    with _errors_name(path), whole_file(path, force=True) as file:
        file.write(json.dumps(asdict(calibration), indent=1).encode())


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FiddlerError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error).rpartition(";")[0]
        raise ResourceError(
            f"the calibration cannot be stored: {reason}; make room, or name another folder in XDG_CACHE_HOME"
        ) from error


def stored() -> list[Calibration]:
    """All cached calibrations."""
    calibrations = (read_calibration(path) for path in sorted(cache_folder().glob("calibration-*.json")))
    return [calibration for calibration in calibrations if calibration is not None]


def read_calibration(path: Path) -> Calibration | None:
    """The calibration in a file; None where there is none, or one that is damaged or of another version."""
    try:
        fields = json.loads(read_regular(path, _LARGEST_FILE))
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        calibration = Calibration(**{**fields, **lists})
        seconds = (
            *calibration.cpu_seconds,
            *calibration.gpu_seconds,
            *calibration.copy_speeds(),
            *calibration.cpu_alone,
        )
        splits = calibration.cpu_split, calibration.copy_split
        counts = (*calibration.cpu_tokens, *calibration.gpu_tokens, calibration.threads, calibration.expert_bytes)
        valid = (
            calibration.version == _VERSION
            and isinstance(calibration.machine, str)
            and all(isinstance(value, float) and 0 < value < inf for value in seconds)
            and all(isinstance(value, float) and 0 <= value < inf for value in splits)
            and all(type(value) is int and 0 < value < _LARGEST_COUNT for value in counts)
        )
        if valid:
            calibration.costs()
            calibration.to_text()
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ):
        return None
    return calibration if valid else None

"""What the commands of the command line share: options with a few values, lists of numbers, saying something."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Never

import typer

__all__ = ["DType", "Device", "Missing", "Output", "Precision", "loading_bar", "numbers", "say"]


class DType(StrEnum):
    """--dtype of `convert`."""

    bf16 = "bf16"
    f16 = "f16"


class Device(StrEnum):
    """--device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Missing(StrEnum):
    """--missing."""

    auto = "auto"
    cpu = "cpu"
    stream = "stream"


class Output(StrEnum):
    """-o of `bench`."""

    md = "md"
    json = "json"


class Precision(StrEnum):
    """--precision."""

    fast = "fast"
    exact = "exact"


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of an option like 1,2,8-12. Raises BadParameter, wrong usage, for anything else."""
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise typer.BadParameter(f"{option} {text}: give numbers, as 128 or 128,512")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def say(text: str) -> None:
    """Progress, statistics, warnings and errors: to stderr, which is not what was asked for."""
    print(text, file=sys.stderr)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """What `load` tells its progress to: a bar on terminals, shown from the first experts on."""
    from tqdm import tqdm

    bars: list[tqdm[Never]] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None))
            bars[0].set_description("experts to the GPU")
        bars[0].update(done - bars[0].n)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()

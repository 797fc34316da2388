"""Numbers of options, with their upper ends: lists of lengths, threads, sizes. Usage errors, before heavy imports."""

from __future__ import annotations

import os
import re

import typer

from fiddler.errors import RequestError
from fiddler.load_options import parse_size

__all__ = ["MOST_TOKENS", "check_threads", "is_plain", "most_threads", "numbers", "size"]

MOST_TOKENS = 1 << 24
"""Positions of the longest context that a model file may declare."""

_NUMBER = re.compile("[0-9]{1,12}")
_MOST_NUMBERS = 1000  # of one option


def is_plain(number: str) -> bool:
    """Whether a number is written as other programs write it; Python alone takes 1_000, and digits of any script."""
    return number.isascii() and "_" not in number


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of an option like 1,2,8-12. Raises BadParameter (usage error) for anything else."""
    values: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        if not (_NUMBER.fullmatch(first) and (not dash or _NUMBER.fullmatch(last))):
            raise typer.BadParameter(f"{option} {text[:80]}: give numbers, as 128 or 128,512")
        begin, end = int(first), int(last or first)
        if end < begin or end > MOST_TOKENS:
            raise typer.BadParameter(f"{option} {text[:80]}: give numbers up to {MOST_TOKENS}, the smaller one first")
        if len(values) + end - begin >= _MOST_NUMBERS:
            raise typer.BadParameter(f"{option} {text[:80]}: these are more than {_MOST_NUMBERS} numbers")
        values += range(begin, end + 1)
    return values


def most_threads() -> int:
    """The number of threads that Numba starts with, without importing it."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(given) if _NUMBER.fullmatch(given) else cpus


def check_threads(threads: int | None) -> int | None:
    """`threads`, if this machine runs as many. Raises BadParameter (usage error) otherwise."""
    if threads is not None and not 1 <= threads <= most_threads():
        raise typer.BadParameter(f"{threads} threads: this machine runs 1 to {most_threads()}")
    return threads


def size(text: str) -> int:
    """Bytes of "24GiB" or "8000MB". Raises BadParameter (usage error) for anything else."""
    try:
        return parse_size(text)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None

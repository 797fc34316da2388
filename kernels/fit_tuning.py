"""Measures which tuning row suits this CPU best, and keeps it: at the first start on an unknown CPU, or when asked.

The rows' kernels compute the same products in turn, on weights larger than the last-level cache. Rows of equal content
are measured once. Most of the time goes into compiling: every further row takes as long as a first start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from statistics import median

import numpy as np

from fiddler.errors import ResourceError
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.expert_ffn import expert_ffn
from fiddler.kernels.machine.cpu import cpu_model, cpu_name, cpu_vendor, last_level_cache
from fiddler.kernels.machine.isa import Tier, choose_tier
from fiddler.kernels.machine.threads import set_threads, thread_count
from fiddler.kernels.machine.tuning import (
    TUNINGS,
    Tuning,
    check_store,
    damaged_store,
    family_of,
    is_fitted,
    store_tuning,
    tuning_store,
)
from fiddler.kernels.precompile import precompile

__all__ = ["Fit", "compare_rows", "fit_tuning", "fit_unknown_cpu"]

_TOKENS = (1, 4, 16, 64, 512)
_FIRST_TOKENS = (1, 64)
_GAIN = 0.98  # a row must take less than this share of the time of the row in place
_ROUNDS = 5, 40  # of one number of tokens: at least, at most
_MIN_SECONDS = 0.4  # of the rounds of one number of tokens
_SHAPE = 7168, 2048  # [F, D]: half of Mixtral-8x7B's in both, 88 MB an expert
_MAX_BYTES = 1 << 30  # of all experts

_REMEDY = "make room, or name another folder in XDG_CACHE_HOME"

Seconds = Callable[[Tuning, int], float]


@dataclass(frozen=True)
class Fit:
    """A comparison of rows. ratios: by row and number of tokens, its time over that of `before`."""

    row: Tuning
    before: Tuning
    tokens: tuple[int, ...]
    ratios: dict[str, tuple[float, ...]]

    def to_text(self) -> str:
        """A line on the choice, then one a row."""
        better = f"faster than {self.before.name}" if self.row is not self.before else "no other row is clearly faster"
        lines = [f"{self.row.name} suits {cpu_model()} ({cpu_name()}): {better}"]
        for name, ratios in self.ratios.items():
            points = ", ".join(f"{tokens}: {ratio:.3f}" for tokens, ratio in zip(self.tokens, ratios, strict=True))
            lines.append(f"  {name:10} {_mean(ratios):.3f} of the time of {self.before.name}; for tokens: {points}")
        return "\n".join(lines)


def fit_unknown_cpu(notify: Callable[[str], None]) -> None:
    """Where this CPU has no tuning row yet, compare two and store the faster: seconds, once, after one line.

    Stores nothing and measures nothing where the result cannot be stored: the next start would measure again.
    """
    if damaged_store():
        notify(f"warning: {tuning_store()} is damaged and ignored; remove it, or run `fiddler calibrate --kernels`")
    if is_fitted():
        return
    tier = choose_tier()
    rows = _distinct(tier, "portable", _newest(tier), "zen5")[:2]
    try:
        check_store()
        notify(f"unknown CPU {cpu_model()} ({cpu_name()}): choosing kernel settings; the next start finds them on disk")
        store_tuning(_measured(rows, _FIRST_TOKENS, tier, None).row)
    except OSError as error:
        notify(f"warning: {tuning_store()}: no kernel settings for this CPU can be stored: {error.strerror}; {_REMEDY}")


def fit_tuning(threads: int | None = None) -> Fit:
    """Compare all rows on this CPU and store the fastest; takes up to a minute where kernels must be compiled.

    threads: of the kernels; None for every physical core. The family's own row, or "portable", stays where no other
    row is faster by 2 %. Raises ResourceError where the result cannot be stored.
    """
    tier = choose_tier()
    rows = _distinct(tier, family_of(cpu_name()) or "portable", _newest(tier), *TUNINGS)
    try:
        check_store()
        fit = _measured(rows, _TOKENS, tier, threads)
        store_tuning(fit.row)
    except OSError as error:
        raise ResourceError(
            f"{tuning_store()}: the kernel settings cannot be stored: {error.strerror}; {_REMEDY}"
        ) from error
    return fit


def compare_rows(rows: Sequence[Tuning], tokens: Sequence[int], seconds: Seconds) -> Fit:
    """Measure every row in turn, and choose: the first one, unless another takes less than 0.98 of its time.

    seconds: runs the products of a row for a number of tokens once and returns its time. A row's time is the geometric
    mean over `tokens` of its ratio to the first row's time: of the median ratio of a round and that of both rows'
    shortest times the larger, since other programs' load disturbs these two in different ways.
    """
    ratios: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in tokens:
        for row in rows:
            seconds(row, number)  # does not count
        rounds: list[dict[str, float]] = []
        spent = 0.0
        while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and spent < _MIN_SECONDS * len(rows)):
            first = len(rounds) % len(rows)  # no row always runs after the same one
            rounds.append({row.name: seconds(row, number) for row in (*rows[first:], *rows[:first])})
            spent += sum(rounds[-1].values())
        before = rows[0].name
        shortest = {row.name: min(times[row.name] for times in rounds) for row in rows}
        for name in ratios:
            typical = median(times[name] / times[before] for times in rounds)
            ratios[name].append(max(typical, shortest[name] / shortest[before]))
    fastest = min(rows, key=lambda row: _mean(ratios[row.name]))
    chosen = fastest if _mean(ratios[fastest.name]) < _GAIN else rows[0]
    return Fit(chosen, rows[0], tuple(tokens), {name: tuple(values) for name, values in ratios.items()})


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return float(prod(ratios) ** (1 / len(ratios)))


def _newest(tier: Tier) -> str:
    """The row of the vendor's newest family, for a CPU with the instructions of `tier`."""
    if cpu_vendor() == "AuthenticAMD":
        return "zen5"
    if cpu_vendor() == "GenuineIntel":
        return "intel_amx" if tier.tiles else "intel"
    return "portable"


def _distinct(tier: Tier, *names: str) -> list[Tuning]:
    """These rows in this order, each content once, but for those whose instructions `tier` lacks."""
    found: dict[Tuning, Tuning] = {}
    for name in names:
        row = TUNINGS[name]
        if tier.tiles or name != "intel_amx":
            found.setdefault(replace(row, name=""), row)
    return list(found.values())


def _measured(rows: Sequence[Tuning], tokens: Sequence[int], tier: Tier, threads: int | None) -> Fit:
    """`compare_rows` with the kernels of this CPU."""
    for row in rows:
        precompile(KernelVariant(tier, "bf16", "bf16", row))
    with _threads(threads):
        return compare_rows(rows, tokens, _product_seconds(tier))


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Run the kernels on this many threads inside the context."""
    before = thread_count()
    set_threads(threads)
    try:
        yield
    finally:
        set_threads(before)


def _product_seconds(tier: Tier) -> Seconds:
    """Times the feed-forward of one expert after another, whose weights no cache holds together."""
    hidden, width = _SHAPE
    expert_bytes = 6 * hidden * width
    experts = max(1, min(2 * last_level_cache(), _MAX_BYTES) // expert_bytes)
    gate, up, down = (np.full((experts, *shape), 0x3C00, np.uint16) for shape in (_SHAPE, _SHAPE, _SHAPE[::-1]))
    runs = count()

    def seconds(row: Tuning, tokens: int) -> float:
        variant = KernelVariant(tier, "bf16", "bf16", row)
        x, routing_weights = np.full((tokens, width), 0.01, np.float32), np.ones((tokens, 1), np.float32)
        expert_ids = np.full((tokens, 1), next(runs) % experts)
        started = time.perf_counter()
        expert_ffn(x, expert_ids, routing_weights, gate, up, down, variant)
        return time.perf_counter() - started

    return seconds

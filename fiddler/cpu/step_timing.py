"""Measures the seconds of a step by its number of tokens, once: the next start finds the curve on disk.

A step of a deep model takes long, so one layer of each kind is timed, and the output, and their seconds are added up:
of tokens of as many sequences, each its first. What attention to earlier positions takes comes on top.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path

import torch

from fiddler.cost_curve import Curve
from fiddler.errors import FiddlerError
from fiddler.files.atomic_file import whole_file
from fiddler.input_file import read_regular
from fiddler.kernels.machine.tuning import tuning_store
from fiddler.models.transformer import Transformer
from fiddler.runtime.runner import Runner

__all__ = ["step_curve"]

_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024)
_SECONDS = 0.2  # a piece of work is timed so long, and at least so often
_LEAST = 3
_LARGEST_FILE = 1 << 16  # [bytes]
_VERSION = 2  # of the kernels and of how they are measured


def step_curve(runner: Runner, model: Transformer, setup: str, notify: Callable[[str], None]) -> Curve:
    """The curve of this runner's steps, from disk or measured now.

    model: the runner's, with no recorder. setup: names what the curve holds for: machine, kernels, and the model's
    shape. notify: called with one line where it is measured, and where it cannot be stored.
    """
    key = f"{setup}; version {_VERSION}"
    path = tuning_store().parent / f"step-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = _read(path, key)
    if known is not None:
        return known
    notify("measuring how the time of a step grows with its tokens; the next start finds the result on disk")
    most = min(runner.chunk, len(runner.sequences(_TOKENS[-1], 1)))  # each token is another sequence's
    counts = [count for count in _TOKENS if count <= most]
    curve = Curve(tuple(counts), _plausible(counts, [_seconds(runner, model, count) for count in counts]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, force=True) as file:
            file.write(json.dumps({"setup": key, "tokens": curve.tokens, "seconds": curve.seconds}).encode())
    except (OSError, FiddlerError) as error:
        notify(f"warning: the times of steps cannot be stored: {error}")
    return curve


def _seconds(runner: Runner, model: Transformer, tokens: int) -> float:
    """Seconds of a step of one token each of `tokens` sequences, at their first position."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
    sequences = [(runner.sequence(1), 1) for _ in range(tokens)]
    total = 0.0
    with runner.timing(sequences) as step:
        h = model.embed(ids)
        for dense in (True, False):
            layers = [layer for layer, block in enumerate(model.blk) if block.dense is dense]
            if layers:
                total += len(layers) * _timed(partial(model.layer, layers[0], h, step))
        return total + _timed(partial(model.logits, h))


def _plausible(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Measured seconds without what other programs added: more tokens take no less, and no more than one by one."""
    bounded = [seconds[0]]
    for (count, after), measured in zip(pairwise(counts), seconds[1:], strict=True):
        bounded.append(min(measured, bounded[-1] * after / count))
    return tuple(min(bounded[index:]) for index in range(len(bounded)))


def _timed(work: Callable[[], object]) -> float:
    """The least seconds of `work`: a first time reads its weights from disk, and other programs delay some others."""
    work()
    seconds: list[float] = []
    while len(seconds) < _LEAST or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _read(path: Path, key: str) -> Curve | None:
    """The curve in a file; None where there is none, or one that is damaged or of another setup."""
    try:
        fields = json.loads(read_regular(path, _LARGEST_FILE))
        if fields["setup"] != key or not all(0 < value < inf for value in (*fields["tokens"], *fields["seconds"])):
            return None
        return Curve(tuple(fields["tokens"]), tuple(fields["seconds"]))
    except (OSError, ValueError, TypeError, LookupError, AssertionError, RecursionError):
        return None

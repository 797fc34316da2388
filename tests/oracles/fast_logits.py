"""Fast precision against a reference's logits: positions after a flipped expert are left out, flips have a bound."""

from __future__ import annotations

from typing import NamedTuple

import torch

from oracles.flipped_experts import flips

__all__ = ["FastLogits", "check_fast_logits"]

LENGTHS = 1, 7, 12, 12, 20, 20, 40


class FastLogits(NamedTuple):
    """The largest relative L2 error of a sequence's logits; positions compared; all positions."""

    worst: float
    compared: int
    total: int

    def __str__(self) -> str:
        return f"fast {self.worst:.1e}, {self.total - self.compared} of {self.total} after a flip"


def check_fast_logits(engine, recorder, reference, bound):
    """Assert that an engine in fast precision with a `ChosenExperts` deviates by roundings only, at most by `bound`."""
    generator = torch.Generator().manual_seed(6)
    worst, compared, total = 0.0, 0, 0
    for length in LENGTHS:
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        recorder.by_layer.clear()
        expected, actual = reference(ids), engine.logits(ids)
        clean, clear = flips(reference.routers, recorder.by_layer, bound, length)
        assert clear is None, f"flipped against a clear margin: {clear}"
        total, compared = total + length, compared + int(clean.sum())
        if not clean.any():
            continue
        actual, expected = actual[clean], expected[clean]
        worst = max(worst, float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)))
        for t in (actual.argmax(-1) != expected.argmax(-1)).nonzero()[:, 0].tolist():
            top = expected[t].topk(2).values
            assert float(top[0] - top[1]) <= bound * float(expected[t].norm())
    assert worst < bound
    assert compared >= total // 2, f"{total - compared} of {total} positions follow a flipped expert"
    return FastLogits(worst, compared, total)

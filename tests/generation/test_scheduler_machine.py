"""Any mixture of joins, cancels, preemptions, evictions and prefix hits gives each request its text alone."""

from __future__ import annotations

import fiddler
from oracles.scheduler_machine import Alone, mix
from oracles.synthetic import write_random_mixtral


def test_requests_in_any_mixture_give_what_each_gives_alone(tmp_path):
    path = write_random_mixtral(tmp_path / "tiny.gguf")
    mix(fiddler.load(path, device="cpu", precision="exact"), Alone(path), 40)

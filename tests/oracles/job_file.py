"""Writes a batch's file of prompts and opens it."""

from __future__ import annotations

import json

from fiddler import Sampling
from fiddler.generation.request import Request
from fiddler.serving.batch_input import JobFile

DEFAULTS = Request("", Sampling(temperature=0.5, seed=1), 7, ("end",), ignore_eos=True)


def job_file(tmp_path, *lines, defaults=DEFAULTS):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return JobFile(path, defaults)

"""Counts how often each expert is chosen; reads a file of such counts. Knows expert ids; no model, no executor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from fiddler.errors import RequestError
from fiddler.input_file import read_input
from fiddler.telemetry.recorder import SilentRecorder

__all__ = ["ExpertCounts", "read_counts"]


_LARGEST_FILE = 16 << 20  # [bytes]; 64 layers of 512 experts with 20 digits each take 0.7 MB


class ExpertCounts(SilentRecorder):
    """A `Recorder` that counts the tokens that chose each expert, of prompts and single tokens alike."""

    wants_expert_ids = True

    def __init__(self, layers: int, experts: int) -> None:
        """layers, experts: of the model, L and E."""
        self._shape = layers, experts
        self._counts: dict[torch.device, Tensor] = {}  # a step's ids may come from the GPU, the next one's from the CPU

    @torch.inference_mode()
    def chosen(self, layer: int, expert_ids: Tensor) -> None:
        """Implements `Recorder.chosen`; waits for no GPU."""
        ids = expert_ids.reshape(-1)
        counts = self._counts.get(ids.device)
        if counts is None:
            counts = self._counts[ids.device] = torch.zeros(self._shape, dtype=torch.int64, device=ids.device)
        counts[layer].index_add_(0, ids, torch.ones_like(ids))  # bincount would wait for the GPU

    @property
    def counts(self) -> list[list[int]]:
        """Tokens so far, [L][E]. Of a prompt, the last layer computes its last token only, and counts no other."""
        total = torch.zeros(self._shape, dtype=torch.int64)
        for counts in self._counts.values():
            total += counts.cpu()
        rows: list[list[int]] = total.tolist()
        return rows


def read_counts(path: Path, layers: int, experts: int) -> list[list[int]]:
    """Expert counts of a file as `fiddler perplexity --expert-counts` writes them: JSON, {"counts": [L][E]}.

    Raises RequestError, in one line that names the file, where it is no such file or is of another model's shape.
    """
    text = read_input(path, _LARGEST_FILE, "name a file that `fiddler perplexity --expert-counts` wrote")
    try:
        counts: list[list[int]] = json.loads(text)["counts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(
            f'{path}: is no file of expert counts; it is JSON, {{"counts": [layers][experts]}}'
        ) from None
    shaped = isinstance(counts, list) and all(
        isinstance(row, list) and all(type(count) is int and count >= 0 for count in row) for row in counts
    )
    if not shaped or {len(row) for row in counts} != {experts} or len(counts) != layers:
        raise RequestError(f"{path}: does not hold counts of {layers} layers with {experts} experts each")
    return counts

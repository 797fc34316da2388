"""Writes stories with a GGUF model that fiddler runs, many at once on the CPU. Knows no rules for good stories.

`fiddler batch` does the same for any requests, each with a sampler of its own. Here all texts are drawn in one go:
with a model of a few million parameters the samplers would take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from smollm import Manner
from torch import Tensor

import fiddler

CANDIDATES = 64  # most probable tokens that can be drawn at all; min_p leaves fewer, nearly always


def draw(logits: Tensor, counts: Tensor, urge: Tensor, end: int, manner: Manner) -> Tensor:
    """`smollm.sample_plain`, its penalties and noise for the `CANDIDATES` best only: tokens [N].

    logits float32 [N, V], counts [N, V] of the tokens that each text has, urge [N] for the logit of `end`.
    """
    logits[:, end] += urge
    best, ids = logits.topk(CANDIDATES, -1)
    had = counts.gather(1, ids)
    best = best - manner.presence * (had > 0) - manner.frequency * had.clamp(max=4)
    best = best / manner.temperature
    allowed = best >= best.amax(-1, keepdim=True) + math.log(manner.min_p)
    noise = -torch.empty_like(best).exponential_().log()
    winner = torch.where(allowed, best + noise, float("-inf")).argmax(-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


class EngineWriter:
    """Texts in flight on one thread. As `smollm.Writer`: `write` yields what was written after each prompt."""

    def __init__(self, path: Path, texts: int, length: int, manner: Manner) -> None:
        """texts: at once. length: positions of a text, with its prompt."""
        self.engine = fiddler.load(path, device="cpu", threads=1)
        self.texts, self.length, self.manner = texts, length, manner
        self.written = 0

    def encode(self, opener: str) -> list[int]:
        """The ids of a story's first words, after the beginning-of-text token."""
        return self.engine.tokenizer.encode(opener, add_bos=True)

    def decode(self, ids: list[int]) -> str:
        """The text of a prompt and what follows it."""
        return self.engine.tokenizer.decode(ids)

    @torch.inference_mode()
    def write(self, prompts: Iterator[list[int]]) -> Iterator[list[tuple[str, bool]]]:
        """Yield, after each step, the texts that ended, prompts included, and whether they were complete."""
        runner, end, manner = self.engine.runner, self.engine.tokenizer.eos_id, self.manner
        given = [next(prompts) for _ in range(self.texts)]
        rows, fresh = [list(ids) for ids in given], [list(ids) for ids in given]
        sequences = runner.sequences(self.texts, self.length)
        counts = torch.zeros(self.texts, self.engine.config.vocab_size, dtype=torch.uint8)
        slots = torch.arange(self.texts)
        while True:
            last = torch.tensor([len(ids) for ids in fresh]).cumsum(0) - 1
            logits = runner.step(list(zip(sequences, fresh, strict=True)), wanted=last.tolist()).logits
            assert logits is not None
            beyond = [len(row) - len(ids) - manner.patience for row, ids in zip(rows, given, strict=True)]
            urge = (torch.tensor(beyond).clamp(min=0) * manner.urge).clamp(max=manner.urge_limit)
            drawn = draw(logits, counts, urge, end, manner)
            counts[slots, drawn] = (counts[slots, drawn] + 1).clamp(max=200)
            finished: list[tuple[str, bool]] = []
            for slot, token in enumerate(drawn.tolist()):
                row = rows[slot]
                fresh[slot] = [token]
                if token != end:
                    row.append(token)
                if token == end or len(row) == self.length:
                    finished.append((self.decode(row), token == end))
                    self.written += len(row) - len(given[slot])
                    given[slot] = next(prompts)
                    rows[slot], fresh[slot] = list(given[slot]), list(given[slot])
                    sequences[slot] = runner.sequence(self.length)
                    counts[slot] = 0
            yield finished

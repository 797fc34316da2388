"""One generation, from ids to text: decoding, stop strings, the end, and what it took. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence as Ordered
from dataclasses import dataclass
from typing import Literal

from fiddler.generate import generate
from fiddler.logprobs import LogProbs
from fiddler.memory import peak_memory
from fiddler.runner import Runner
from fiddler.sampling import Sampler
from fiddler.stopping import StopText
from fiddler.tokenizer import Tokenizer

__all__ = ["Completion", "Generation", "Stats"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Stats:
    """What a generation took. Times in seconds; memory in bytes, of the whole process."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generation_seconds: float
    peak_resident: int  # includes the parts of the mapped file that were touched
    anonymous: int  # memory of the process's own, at the end

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_speed(self) -> float:
        """Generated tokens a second, after the first, which the prompt's time includes."""
        more = max(self.generated_tokens - 1, 0)
        return more / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    `finish_reason`: "stop" (end token, stop string, or a constraint that is met) or "length". `log_probs`: where the
    sampling's `n_probs` asks for them, one entry a token; of the model's own distribution, see `logprobs.py`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    log_probs: tuple[LogProbs, ...] = ()


class Generation:
    """A running generation: iterate for pieces of text; afterwards `completion` says how it went."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: Ordered[int],
        new_sampler: Callable[[], Sampler],
        limit: int,
        stop: Ordered[str],
        load_seconds: float,
    ) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._prompt, self._new_sampler, self._limit, self._stop = prompt, new_sampler, limit, stop
        self._load_seconds = load_seconds
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The result, once every piece was taken."""
        assert self._completion is not None, "the generation has not ended"
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty; whole characters only."""
        ends = self._tokenizer.end_ids
        sampler = self._new_sampler()
        decoder, stop = self._tokenizer.stream(continuing=True), StopText(self._stop)
        reason: FinishReason = "length"
        tokens: list[int] = []
        text: list[str] = []
        started = first = time.perf_counter()
        for token in generate(self._runner, self._runner.sequence(), self._prompt, sampler, self._limit):
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            if token in ends:
                reason = "stop"
                break
            piece = stop.push(decoder.push(token))
            if piece:
                text.append(piece)
                yield piece
            if stop.found:
                reason = "stop"
                break
        ended = time.perf_counter()
        if not tokens:
            first = ended
        rest = stop.push(decoder.finish()) + stop.finish()
        if rest:
            text.append(rest)
            yield rest
        if stop.found or sampler.finished:
            reason = "stop"
        memory = peak_memory()
        stats = Stats(
            load_seconds=self._load_seconds,
            prompt_tokens=len(self._prompt),
            prompt_seconds=first - started,
            generated_tokens=len(tokens),
            generation_seconds=ended - first,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
        )
        self._completion = Completion("".join(text), tuple(tokens), reason, stats, tuple(sampler.log_probs))

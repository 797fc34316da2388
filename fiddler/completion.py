"""One generation, from ids to text: decoding, stop strings, the end, and what it took. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence as Ordered
from dataclasses import dataclass
from typing import Literal

from fiddler.cache import Sequence
from fiddler.generate import generate
from fiddler.memory import peak_memory
from fiddler.runner import Runner
from fiddler.sampling import Sampler, Sampling
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
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens a second, of those that were computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_speed(self) -> float:
        """Generated tokens a second, after the first, which the prompt's time includes."""
        more = max(self.generated_tokens - 1, 0)
        return more / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished generation. `finish_reason`: "stop" (end token or stop string) or "length"."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


class Generation:
    """A running generation: iterate for pieces of text; afterwards `completion` says how it went."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: Ordered[int],
        sampling: Sampling,
        limit: int,
        stop: Ordered[str],
        ignore_eos: bool,
        load_seconds: float,
        after_prompt: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        """`after_prompt`: is told when a sequence holds the prompt and nothing else."""
        self._runner, self._tokenizer = runner, tokenizer
        self._prompt, self._sampling, self._limit = prompt, sampling, limit
        self._stop, self._ignore_eos = stop, ignore_eos
        self._load_seconds, self._after_prompt = load_seconds, after_prompt
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The result, once every piece was taken."""
        assert self._completion is not None, "the generation has not ended"
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty; whole characters only."""
        sequence, tokens = self._runner.resume(self._prompt), list[int]()
        try:
            yield from self._pieces(sequence, tokens)
        except (GeneratorExit, KeyboardInterrupt):
            self._runner.keep(sequence, [*self._prompt, *tokens])
            raise
        self._runner.keep(sequence, [*self._prompt, *tokens])

    def _pieces(self, sequence: Sequence, tokens: list[int]) -> Iterator[str]:
        """The same, computed with `sequence`; `tokens` grows by what is chosen."""
        ends = self._tokenizer.end_ids
        decoder, stop = self._tokenizer.stream(continuing=True), StopText(self._stop)
        reason: FinishReason = "length"
        cached = sequence.length
        text: list[str] = []
        started = read = first = time.perf_counter()
        for token in generate(
            self._runner,
            sequence,
            self._prompt,
            Sampler(self._sampling),
            self._limit,
            banned=sorted(ends) if self._ignore_eos else (),
        ):
            if not tokens:
                read = time.perf_counter()
                self._after_prompt(sequence)
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
            read = first = ended
            self._after_prompt(sequence)
        rest = stop.push(decoder.finish()) + stop.finish()
        if rest:
            text.append(rest)
            yield rest
        if stop.found:
            reason = "stop"
        memory = peak_memory()
        stats = Stats(
            load_seconds=self._load_seconds,
            prompt_tokens=len(self._prompt),
            prompt_seconds=read - started,
            generated_tokens=len(tokens),
            generation_seconds=ended - first,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=cached,
        )
        self._completion = Completion("".join(text), tuple(tokens), reason, stats)

"""Beam search: several beginnings of a text go on side by side, in one step of the model; the best ones are returned.

Keys and values follow the beams: one that goes on in several ways is copied into the memory of those that were
dropped, from the first position on where they differ. What lives and what is finished, `hypotheses` decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fiddler.generation.beam_hypotheses import BeamOptions, Finished, Hypotheses, Live
from fiddler.generation.completion import FinishReason, Stats
from fiddler.generation.generate import finite
from fiddler.generation.stop_strings import StopText
from fiddler.host_memory import peak_memory
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.prefix_cache import common
from fiddler.runtime.runner import Runner
from fiddler.sampling.logprobs import log_softmax
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Beam", "BeamSearch"]


@dataclass(frozen=True)
class Beam:
    """A finished beam. `score`: the sum of log-probabilities over (number of tokens) ** length_penalty.

    `tokens` include the end token or those of the stop string, `text` does not.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass
class _Place:
    """Where a beam's keys and values lie, and the tokens after the prompt that they are of."""

    sequence: KVCache
    tokens: tuple[int, ...] = ()


class BeamSearch:
    """A search that was prepared: `run` it for the beams, best first; afterwards `stats` say what it took."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: BeamOptions,
        limit: int,
        stop: Sequence[str],
        ignore_eos: bool,
        load_seconds: float,
        after_prompt: Callable[[KVCache], None] = lambda sequence: None,
        reuse: bool = False,
    ) -> None:
        """`after_prompt`: is told when a sequence holds the prompt and nothing else. `reuse`: as of a `Generation`."""
        self._reuse = reuse
        self._runner, self._tokenizer = runner, tokenizer
        self._prompt, self._options, self._limit = prompt, options, limit
        self._stop, self._load_seconds, self._after_prompt = stop, load_seconds, after_prompt
        self._ends = frozenset() if ignore_eos else tokenizer.end_ids
        self._banned = sorted(tokenizer.end_ids) if ignore_eos else []
        self._stats: Stats | None = None

    @property
    def stats(self) -> Stats:
        """What the search took; `generated_tokens` are those of one beam, which is the number of steps."""
        assert self._stats is not None, "the search has not ended"
        return self._stats

    def run(self) -> list[Beam]:
        """The finished beams, at most as many as the search is wide, best first.

        They are fewer where stop strings ended so many that too few were left to go on.
        Raises FileFormatError where the model computes something that is no number.
        """
        started = time.perf_counter()
        first = _Place(self._runner.resume(self._prompt if self._reuse else []))
        cached = first.sequence.length
        logits = self._runner.prefill(first.sequence, self._prompt[cached:])[None]
        read = time.perf_counter()
        finite(logits.numpy(), len(self._prompt))  # before anything is kept
        self._after_prompt(first.sequence)
        search = Hypotheses(self._options, max(self._limit, 1), self._is_ended, len(self._ends))
        begun, steps, places = time.perf_counter(), 0, [first]
        while steps < self._limit and not search.over:
            log_probs = log_softmax(finite(logits.numpy(), len(self._prompt) + steps))
            log_probs[:, self._banned] = -np.inf
            search.advance(log_probs)
            steps += 1
            if not search.over:
                places = self._follow(places, search.live)
                logits = self._runner.logits(
                    self._runner.step([(place.sequence, place.tokens[-1:]) for place in places[: len(search.live)]])
                )
        ended = time.perf_counter()
        self._runner.keep(first.sequence, [*self._prompt, *first.tokens])
        memory = peak_memory()
        self._stats = Stats(
            load_seconds=self._load_seconds,
            prompt_tokens=len(self._prompt),
            prompt_seconds=read - started,
            generated_tokens=steps,
            generation_seconds=ended - begun,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=cached,
        )
        return [self._made(beam) for beam in search.finished or [Finished((), 0.0)]]

    def _follow(self, places: list[_Place], live: list[Live]) -> list[_Place]:
        """A place for each living beam with its parent's keys and values, in their order; then those left over.

        `places` of the parents, in their order, then free ones. A beam takes its parent's place; only where two have
        the same parent is one copied, into the free place that has most of it already.
        """
        parents = {beam.parent for beam in live}
        free = [place for i, place in enumerate(places) if i not in parents]
        taken: set[int] = set()
        made = []
        for beam in live:
            place = places[beam.parent]
            if beam.parent in taken:
                place = self._copied(place, free)
            taken.add(beam.parent)
            made.append(place)
        for place, beam in zip(made, live, strict=True):
            place.tokens = beam.tokens
        return made + free

    def _copied(self, source: _Place, free: list[_Place]) -> _Place:
        target = max(free, key=lambda place: common(place.tokens, source.tokens), default=None)
        if target is None:
            return _Place(self._runner.copy(source.sequence))
        free.remove(target)
        shared = len(self._prompt) + common(target.tokens, source.tokens)
        self._runner.copy(source.sequence, target.sequence, shared)
        return target

    def _is_ended(self, tokens: tuple[int, ...]) -> bool:
        return tokens[-1] in self._ends or (bool(self._stop) and self._written(tokens, whole=False)[1])

    def _made(self, beam: Finished) -> Beam:
        by_token = bool(beam.tokens) and beam.tokens[-1] in self._ends
        text, stopped = self._written(beam.tokens[:-1] if by_token else beam.tokens, whole=True)
        return Beam(text, beam.tokens, beam.score, "stop" if by_token or stopped else "length")

    def _written(self, tokens: tuple[int, ...], *, whole: bool) -> tuple[str, bool]:
        """The text of a beam's tokens before the first stop string, and whether there is one. `whole`: no more come."""
        decoder, stop = self._tokenizer.stream(continuing=True), StopText(self._stop)
        text = "".join([stop.push(decoder.push(token)) for token in tokens])
        if whole:
            text += stop.push(decoder.finish()) + stop.finish()
        return text, stop.found

"""Beam search: several beams continue a prompt side by side, in one step of the model; the best ones are returned.

KV caches follow the beams: that of a beam with several continuations is copied into the memory of a dropped beam, from
the first position on where the two differ. `beam_hypotheses` decides which beams live and which are finished.
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

    `tokens` include the end token or the tokens of the stop string, `text` does not.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass
class _BeamCache:
    """A beam's KV cache, and the tokens that it holds after the prompt."""

    sequence: KVCache
    tokens: tuple[int, ...] = ()


class BeamSearch:
    """A prepared search: `run` returns the beams, best first; afterwards `stats` has its times and memory."""

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
        """`after_prompt`: called with the sequence when it holds just the prompt. `reuse`: see `Generation`."""
        self._reuse = reuse
        self._runner, self._tokenizer = runner, tokenizer
        self._prompt, self._options, self._limit = prompt, options, limit
        self._stop, self._load_seconds, self._after_prompt = stop, load_seconds, after_prompt
        self._ends = frozenset() if ignore_eos else tokenizer.end_ids
        self._banned = sorted(tokenizer.end_ids) if ignore_eos else []
        self._stats: Stats | None = None

    @property
    def stats(self) -> Stats:
        """Times and memory of the search; `generated_tokens` are those of one beam: the number of steps."""
        assert self._stats is not None, "the search has not ended"
        return self._stats

    def run(self) -> list[Beam]:
        """The finished beams, at most `num_beams`, best first.

        They are fewer where stop strings ended so many beams that too few were left to go on.
        Raises FileFormatError where the model computes something that is no number.
        """
        started = time.perf_counter()
        first = _BeamCache(self._runner.resume(self._prompt if self._reuse else []))
        cached = first.sequence.length
        logits = self._runner.prefill(first.sequence, self._prompt[cached:])[None]
        prompt_read = time.perf_counter()
        finite(logits.numpy(), len(self._prompt))  # before the prompt is cached in a file
        self._after_prompt(first.sequence)
        search = Hypotheses(self._options, max(self._limit, 1), self._is_ended, len(self._ends))
        begun, steps, caches = time.perf_counter(), 0, [first]
        while steps < self._limit and not search.over:
            log_probs = log_softmax(finite(logits.numpy(), len(self._prompt) + steps))
            log_probs[:, self._banned] = -np.inf
            search.advance(log_probs)
            steps += 1
            if not search.over:
                caches = self._follow(caches, search.live)
                parts = [(cache.sequence, cache.tokens[-1:]) for cache in caches[: len(search.live)]]
                output = self._runner.step(parts)
                assert output.logits is not None
                logits = output.logits
        ended = time.perf_counter()
        self._runner.keep(first.sequence, [*self._prompt, *first.tokens])
        memory = peak_memory()
        self._stats = Stats(
            load_seconds=self._load_seconds,
            prompt_tokens=len(self._prompt),
            prompt_seconds=prompt_read - started,
            generated_tokens=steps,
            generation_seconds=ended - begun,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=cached,
        )
        return [self._as_beam(beam) for beam in search.finished or [Finished((), 0.0)]]

    def _follow(self, caches: list[_BeamCache], live: list[Live]) -> list[_BeamCache]:
        """A cache for each living beam with its parent's keys and values, in the beams' order; then the free caches.

        `caches`: those of the parents, in their order, then free ones. A beam takes its parent's cache; a second beam
        of the same parent gets a copy, in the free cache that has the longest common prefix with it.
        """
        parents = {beam.parent for beam in live}
        free = [cache for i, cache in enumerate(caches) if i not in parents]
        continued: set[int] = set()
        followers = []
        for beam in live:
            cache = caches[beam.parent]
            if beam.parent in continued:
                cache = self._copied(cache, free)
            continued.add(beam.parent)
            followers.append(cache)
        for cache, beam in zip(followers, live, strict=True):
            cache.tokens = beam.tokens
        return followers + free

    def _copied(self, source: _BeamCache, free: list[_BeamCache]) -> _BeamCache:
        target = max(free, key=lambda cache: common(cache.tokens, source.tokens), default=None)
        if target is None:
            return _BeamCache(self._runner.copy(source.sequence))
        free.remove(target)
        shared = len(self._prompt) + common(target.tokens, source.tokens)
        self._runner.copy(source.sequence, target.sequence, shared)
        return target

    def _is_ended(self, tokens: tuple[int, ...]) -> bool:
        return tokens[-1] in self._ends or (bool(self._stop) and self._decoded(tokens, whole=False)[1])

    def _as_beam(self, beam: Finished) -> Beam:
        by_token = bool(beam.tokens) and beam.tokens[-1] in self._ends
        text, stopped = self._decoded(beam.tokens[:-1] if by_token else beam.tokens, whole=True)
        return Beam(text, beam.tokens, beam.score, "stop" if by_token or stopped else "length")

    def _decoded(self, tokens: tuple[int, ...], *, whole: bool) -> tuple[str, bool]:
        """The text of a beam's tokens before the first stop string, and whether there is one. `whole`: no more come."""
        stream, stop = self._tokenizer.stream(continuing=True), StopText(self._stop)
        text = "".join([stop.push(stream.push(token)) for token in tokens])
        if whole:
            text += stop.push(stream.finish()) + stop.finish()
        return text, stop.found

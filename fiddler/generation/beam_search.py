"""Beam search: several beams continue a prompt side by side, in one step of the model; the best ones are returned.

KV caches follow the beams: that of a beam with several continuations is copied into the memory of a dropped beam, from
the first position on where the two differ. `beam_hypotheses` decides which beams live and which are finished.
"""

from __future__ import annotations

import time

import numpy as np

from fiddler.generation.beam_hypotheses import BeamOptions, Finished, Hypotheses, Live
from fiddler.generation.beam_text import BeamTexts
from fiddler.generation.completion import Beam, BeamResult, Stats
from fiddler.generation.drivers import run_alone
from fiddler.generation.events import Finished as FinishedEvent
from fiddler.generation.request import CheckedPrompt
from fiddler.generation.sequence_group import Advance, Fork, RunningSequence, finite
from fiddler.generation.stop_strings import StopText
from fiddler.host_memory import peak_memory
from fiddler.runtime.prefix_cache import common
from fiddler.runtime.runner import Runner
from fiddler.sampling.logprobs import log_softmax
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Beam", "BeamGroup", "BeamSearch"]


class BeamSearch:
    """A prepared search: `run` returns the beams, best first; afterwards `stats` has its times and memory.

    Or add it to a scheduler, to run it beside other requests: it ends with a `BeamResult`.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: CheckedPrompt,
        options: BeamOptions,
        ignore_eos: bool,
        load_seconds: float,
    ) -> None:
        self.prompt, self.options, self.limit, self.reuse = prompt.ids, options, prompt.limit, prompt.reuse
        self.interactive = prompt.interactive
        self.after_prompt, self.load_seconds = prompt.after_prompt, load_seconds
        self._runner, self._tokenizer, self._stop = runner, tokenizer, prompt.stop
        self.end_ids = frozenset[int]() if ignore_eos else tokenizer.end_ids
        self.banned = sorted(tokenizer.end_ids) if ignore_eos else []
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
        *_, last = run_alone(self._runner, self)
        assert isinstance(last, FinishedEvent)
        assert isinstance(last.result, BeamResult)
        self._stats = last.result.stats
        return list(last.result.beams)

    def begin(self) -> BeamGroup:
        """Implements `PreparedRequest.begin`."""
        return BeamGroup(self)

    def as_beam(self, beam: Finished) -> Beam:
        """A finished beam with its text."""
        by_token = bool(beam.tokens) and beam.tokens[-1] in self.end_ids
        text, stopped = self._decoded(beam.tokens[:-1] if by_token else beam.tokens)
        return Beam(text, beam.tokens, beam.score, "stop" if by_token or stopped else "length")

    def new_texts(self) -> BeamTexts:
        """Where stop strings are looked for."""
        return BeamTexts(self._tokenizer, self._stop)

    def _decoded(self, tokens: tuple[int, ...]) -> tuple[str, bool]:
        """The text of a beam's tokens before the first stop string, and whether there is one."""
        stream, stop = self._tokenizer.stream(continuing=True), StopText(self._stop)
        text = "".join([stop.push(stream.push(token)) for token in tokens])
        text += stop.push(stream.finish()) + stop.finish()
        return text, stop.found


class BeamGroup:
    """The `SequenceGroup` of a beam search: one sequence for each living beam, in the beams' order."""

    def __init__(self, search: BeamSearch) -> None:
        self.prompt, self.reuse, self.interactive = search.prompt, search.reuse, search.interactive
        self.max_positions, self.max_sequences = len(search.prompt) + search.limit, search.options.num_beams
        self.sequences, self.free = [RunningSequence(list(search.prompt))], list[RunningSequence]()
        self._search = search
        self._hypotheses = Hypotheses(search.options, max(search.limit, 1), self._ends, len(search.end_ids))
        self._texts = search.new_texts()
        self._live = [self._texts.start]  # of each living beam
        self._steps = 0
        self._started: float | None = None  # times of `time.perf_counter`: of the first step,
        self._read: float | None = None  # when the prompt was read,
        self._begun = 0.0  # and of the first choice
        self._cached = 0

    def joined(self, cached: int) -> None:
        """Implements `SequenceGroup.joined`."""
        if self._started is None:
            self._started, self._cached = time.perf_counter(), cached

    def advance(self) -> Advance:
        """Implements `SequenceGroup.advance`: extend each living beam by a token."""
        rows = [sequence.logits for sequence in self.sequences if sequence.logits is not None]
        logits = finite(np.stack(rows), len(self.prompt) + self._steps)
        if self._read is None:
            (sequence,) = self.sequences
            assert sequence.cache is not None
            self._read = time.perf_counter()
            self._search.after_prompt(sequence.cache)
            self._begun = time.perf_counter()
        if self._search.limit == 0:
            return Advance(result=self._result())
        log_probs = log_softmax(logits)
        log_probs[:, self._search.banned] = -np.inf
        self._hypotheses.advance(log_probs)
        self._steps += 1
        if self._hypotheses.over:
            return Advance(result=self._result())
        live = self._hypotheses.live
        self._live = [self._texts.extended(self._live[beam.parent], beam.tokens[-1]) for beam in live]
        return Advance(forks=self._follow(live))

    def _ends(self, beam: int, token: int) -> bool:
        return token in self._search.end_ids or self._texts.extended(self._live[beam], token).stopped

    def _follow(self, live: list[Live]) -> list[Fork]:
        """Let `sequences` be those of the living beams, in their order. A beam continues its parent's sequence; a
        second beam of the same parent gets a fork, in the free sequence that has the longest common prefix with it.
        """
        parents = {beam.parent for beam in live}
        self.free[:0] = [sequence for index, sequence in enumerate(self.sequences) if index not in parents]
        continued: set[int] = set()
        followers, forks = [], []
        for beam in live:
            sequence = self.sequences[beam.parent]
            if beam.parent in continued:
                forks.append(self._fork(sequence))
                sequence = forks[-1].target
            continued.add(beam.parent)
            followers.append(sequence)
        for sequence, beam in zip(followers, live, strict=True):
            sequence.tokens.append(beam.tokens[-1])
        self.sequences = followers
        return forks

    def _fork(self, source: RunningSequence) -> Fork:
        """A fork of `source`, whose tokens are all computed."""
        n = len(self.prompt)
        generated = source.tokens[n:]
        target = max(self.free, key=lambda sequence: common(sequence.tokens[n:], generated), default=None)
        if target is None:
            return Fork(source, RunningSequence(list(source.tokens)), 0)
        self.free.remove(target)
        shared = n + common(target.tokens[n:], generated)
        target.tokens = list(source.tokens)
        return Fork(source, target, shared)

    def _result(self) -> BeamResult:
        ended, memory = time.perf_counter(), peak_memory()
        assert self._started is not None
        assert self._read is not None
        stats = Stats(
            load_seconds=self._search.load_seconds,
            prompt_tokens=len(self.prompt),
            prompt_seconds=self._read - self._started,
            generated_tokens=self._steps,
            generation_seconds=ended - self._begun,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=self._cached,
        )
        finished = self._hypotheses.finished or [Finished((), 0.0)]
        return BeamResult(tuple([self._search.as_beam(beam) for beam in finished]), stats)

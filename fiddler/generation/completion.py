"""One generation, from ids to text: decoding, stop strings, the end, and what it took. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fiddler.generation.generate import generate
from fiddler.generation.stop_strings import StopText
from fiddler.host_memory import peak_memory
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner
from fiddler.sampling.logprobs import LogProbs
from fiddler.sampling.sampler import Sampler
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Completion", "Generation", "Reply", "Stats"]

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
    """A finished generation.

    `finish_reason`: "stop" (end token, stop string, or a constraint that is met) or "length". `log_probs`: where the
    sampling's `n_probs` asks for them, one entry a token; of the model's own distribution, see `logprobs.py`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    log_probs: tuple[LogProbs, ...] = ()


class Reply:
    """The text of a generation as its tokens come, until an end token, a stop string or the last token allowed."""

    def __init__(self, tokenizer: Tokenizer, limit: int, stop: Sequence[str]) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None if limit else "length"  # None while it goes on
        self._ends, self._limit = tokenizer.end_ids, limit
        self._decoder, self._stop = tokenizer.stream(continuing=True), StopText(stop)
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """What is certain so far."""
        return "".join(self._text)

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that is certain with this token, maybe none; all that was held back where it is the last one.

        last: nothing more can be chosen.
        """
        assert self.finish_reason is None, "the reply has ended"
        self.tokens.append(token)
        ended = token in self._ends
        piece = "" if ended else self._stop.push(self._decoder.push(token))
        if ended or last or self._stop.found or len(self.tokens) == self._limit:
            piece += self._stop.push(self._decoder.finish()) + self._stop.finish()
            self.finish_reason = "stop" if ended or last or self._stop.found else "length"
        self._text.append(piece)
        return piece

    def end(self) -> None:
        """Nothing can be chosen, not even a first token."""
        assert not self.tokens
        self.finish_reason = "stop"


class Generation:
    """A generation that was asked for: iterate for pieces of text; afterwards `completion` says how it went.

    Or let it take part in an engine's `batch`, which takes what it needs from here.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        new_sampler: Callable[[], Sampler],
        limit: int,
        stop: Sequence[str],
        load_seconds: float,
        after_prompt: Callable[[KVCache], None] = lambda sequence: None,
        reuse: bool = False,
        on_chunk: Callable[[int], None] = lambda read: None,
    ) -> None:
        """`after_prompt`: is told when a sequence holds the prompt and nothing else; not in a `batch`.

        reuse: go on from the sequence computed last, with what it shares with the prompt. on_chunk: see
        `Runner.prefill`; not in a `batch`.
        """
        self.prompt, self.limit = prompt, limit
        self._runner, self._tokenizer = runner, tokenizer
        self._new_sampler, self._stop = new_sampler, stop
        self._load_seconds, self._after_prompt, self._reuse = load_seconds, after_prompt, reuse
        self._on_chunk = on_chunk
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The result, once every piece was taken."""
        assert self._completion is not None, "the generation has not ended"
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty; whole characters only."""
        reply, sampler = self.begin()
        sequence = self._runner.resume(self.prompt if self._reuse else [])
        cached = sequence.length
        started = read = first = time.perf_counter()
        try:
            for token in generate(self._runner, sequence, self.prompt, sampler, self.limit, self._on_chunk):
                if not reply.tokens:
                    read = time.perf_counter()
                    self._after_prompt(sequence)
                    first = time.perf_counter()
                piece = reply.push(token, last=sampler.finished)
                if piece:
                    yield piece
                if reply.finish_reason is not None:
                    break
        except BaseException:  # whatever holds on to the exception: the next one goes on with the sequence
            self._runner.keep(sequence, [*self.prompt, *reply.tokens])
            raise
        if not reply.tokens:
            read = first = time.perf_counter()
            self._after_prompt(sequence)
        self._runner.keep(sequence, [*self.prompt, *reply.tokens])
        self._completion = self.completed(reply, sampler, started, first, read=read, cached=cached)

    def begin(self) -> tuple[Reply, Sampler]:
        """An empty reply for this generation's tokens, and who chooses them."""
        reply, sampler = Reply(self._tokenizer, self.limit, self._stop), self._new_sampler()
        if sampler.finished:
            reply.end()
        return reply, sampler

    def completed(
        self,
        reply: Reply,
        sampler: Sampler,
        started: float,
        first: float,
        *,
        read: float | None = None,
        cached: int = 0,
    ) -> Completion:
        """What `reply` has become by now. Times by `time.perf_counter`: `started`, and `first`, its first token's.

        read: when the prompt was, if something else came between. cached: tokens of it that were there already.
        """
        assert reply.finish_reason is not None, "the reply has not ended"
        memory = peak_memory()
        stats = Stats(
            load_seconds=self._load_seconds,
            prompt_tokens=len(self.prompt),
            prompt_seconds=(first if read is None else read) - started,
            generated_tokens=len(reply.tokens),
            generation_seconds=time.perf_counter() - first,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=cached,
        )
        log_probs = tuple(sampler.log_probs)
        return Completion(reply.text, tuple(reply.tokens), reply.finish_reason, stats, log_probs)

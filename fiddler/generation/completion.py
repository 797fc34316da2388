"""One generation, from ids to text: decoding, stop strings, the end, times and memory. Knows no files."""

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
    """Times [s] of a generation, and memory [bytes] of the whole process."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generation_seconds: float
    peak_resident: int  # includes the parts of the mapped file that were touched
    anonymous: int  # memory of the process's own, at the end
    cached_tokens: int = 0  # of the prompt, whose keys and values were cached before

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

    `finish_reason`: "stop" (end token, stop string, or a constraint that is met) or "length". `log_probs`: one entry a
    token where the sampling's `n_probs` is above 0; of the model's own distribution, see `logprobs.py`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    log_probs: tuple[LogProbs, ...] = ()


class Reply:
    """The text of a generation as its tokens come, until an end token, a stop string or `limit` tokens."""

    def __init__(self, tokenizer: Tokenizer, limit: int, stop: Sequence[str]) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None if limit else "length"  # None while it goes on
        self._ends, self._limit = tokenizer.end_ids, limit
        self._stream, self._stop = tokenizer.stream(continuing=True), StopText(stop)
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._text)

    def push(self, token: int, *, last: bool = False) -> str:
        """Append a token: the text that it makes certain, maybe none. The last token releases all that was held back.

        last: no other token can follow.
        """
        assert self.finish_reason is None, "the reply has ended"
        self.tokens.append(token)
        ended = token in self._ends
        piece = "" if ended else self._stop.push(self._stream.push(token))
        if ended or last or self._stop.found or len(self.tokens) == self._limit:
            piece += self._stop.push(self._stream.finish()) + self._stop.finish()
            self.finish_reason = "stop" if ended or last or self._stop.found else "length"
        self._text.append(piece)
        return piece

    def end(self) -> None:
        """End an empty reply: not even a first token can be chosen."""
        assert not self.tokens
        self.finish_reason = "stop"


class Generation:
    """A prepared generation: iterate for pieces of text; afterwards `completion` has the result.

    Or pass it to an engine's `batch`, which runs it beside others.
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
        """`after_prompt`: called with the sequence when it holds just the prompt; not in a `batch`.

        reuse: resume the sequence computed last, from its common prefix with the prompt. on_chunk: see
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
        """The result, once the iteration has ended."""
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
        except BaseException:  # the next generation can resume the sequence, even if a caller holds the exception
            self._runner.keep(sequence, [*self.prompt, *reply.tokens])
            raise
        if not reply.tokens:
            read = first = time.perf_counter()
            self._after_prompt(sequence)
        self._runner.keep(sequence, [*self.prompt, *reply.tokens])
        self._completion = self.completed(reply, sampler, started, first, read=read, cached=cached)

    def begin(self) -> tuple[Reply, Sampler]:
        """An empty reply for this generation's tokens, and the sampler that chooses them."""
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
        """The result, from `reply`. Times by `time.perf_counter`: `started`, and `first`, its first token's.

        read: when the prompt was read, if not at `first`. cached: tokens of the prompt that were cached before.
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

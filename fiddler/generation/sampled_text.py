"""One generated text: sampling, decoding, stop strings, the end, times and memory. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

from fiddler.generation.completion import Completion, Reply, Stats
from fiddler.generation.drivers import run_alone
from fiddler.generation.events import Finished, PromptRead, Token
from fiddler.generation.request import CheckedPrompt
from fiddler.generation.sequence_group import Advance, RunningSequence, finite
from fiddler.host_memory import peak_memory
from fiddler.runtime.runner import Runner
from fiddler.sampling.sampler import Sampler
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Generation", "SampledText"]


class Generation:
    """A prepared generation: iterate for pieces of text; afterwards `completion` has the result.

    Or pass it to an engine's `batch`, or add it to a scheduler, to run it beside others.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt: CheckedPrompt,
        new_sampler: Callable[[], Sampler],
        load_seconds: float,
        on_chunk: Callable[[int], None] = lambda read: None,
    ) -> None:
        """on_chunk: called between prefill chunks with the prompt's tokens read so far, while this is iterated.

        It may raise to cancel. A scheduler's events tell the same.
        """
        self.prompt, self.limit, self.reuse = prompt.ids, prompt.limit, prompt.reuse
        self.interactive = prompt.interactive
        self.after_prompt, self.load_seconds = prompt.after_prompt, load_seconds
        self._runner, self._tokenizer = runner, tokenizer
        self._new_sampler, self._stop, self._named_tokens = new_sampler, prompt.stop, prompt.named_tokens
        self._on_chunk = on_chunk
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The result, once the iteration has ended."""
        assert self._completion is not None, "the generation has not ended"
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty; whole characters only. Raises the errors of `SampledText.advance`."""
        with closing(run_alone(self._runner, self)) as events:
            for event in events:
                if isinstance(event, Token):
                    if event.text:
                        yield event.text
                elif isinstance(event, PromptRead):
                    if event.read < event.total:
                        self._on_chunk(event.read)
                elif isinstance(event, Finished):
                    assert isinstance(event.result, Completion)
                    self._completion = event.result

    def run(self) -> Completion:
        """Generate the whole text. Raises the errors of iterating."""
        for _ in self:
            continue
        return self.completion

    def begin(self) -> SampledText:
        """Implements `PreparedRequest.begin`."""
        return SampledText(
            self, Reply(self._tokenizer, self.limit, self._stop, self._named_tokens), self._new_sampler()
        )


class SampledText:
    """The `SequenceGroup` of a text whose tokens a sampler chooses."""

    def __init__(self, generation: Generation, reply: Reply, sampler: Sampler) -> None:
        self.prompt, self.reuse, self.interactive = generation.prompt, generation.reuse, generation.interactive
        self.max_positions, self.max_sequences = len(generation.prompt) + generation.limit, 1
        self.sequences, self.free = [RunningSequence(list(generation.prompt))], list[RunningSequence]()
        self._generation, self._reply, self._sampler = generation, reply, sampler
        self._started: float | None = None  # times of `time.perf_counter`: of the first step,
        self._read: float | None = None  # when the prompt was read,
        self._first = 0.0  # and of the first token
        self._cached = 0
        if sampler.finished:
            reply.end()

    def joined(self, cached: int) -> None:
        """Implements `SequenceGroup.joined`."""
        if self._started is None:
            self._started, self._cached = time.perf_counter(), cached

    def advance(self) -> Advance:
        """Implements `SequenceGroup.advance`. A prompt that no token may follow is read all the same."""
        (sequence,) = self.sequences
        assert sequence.logits is not None
        logits = sequence.logits
        if sequence.largest < 0:
            logits = finite(logits, len(sequence.tokens))
        token = None
        if self._reply.finish_reason is None:
            token = self._sampler(logits, sequence.tokens, sequence.largest)
        last = token is not None and self._sampler.finished
        if self._read is None:
            assert sequence.cache is not None
            self._read = time.perf_counter()
            self._generation.after_prompt(sequence.cache)
            self._first = time.perf_counter()
        if token is None:
            return Advance(result=self._completion())
        sequence.tokens.append(token)
        sequence.greedy = self._sampler.greedy and len(sequence.tokens) + 1 < self.max_positions
        text = self._reply.push(token, last=last)
        log_probs = self._sampler.log_probs[-1] if self._sampler.log_probs else None
        result = None if self._reply.finish_reason is None else self._completion()
        return Advance(token, text, log_probs, (), result)

    def _completion(self) -> Completion:
        reply, memory = self._reply, peak_memory()
        assert reply.finish_reason is not None, "the reply has not ended"
        assert self._started is not None
        assert self._read is not None
        stats = Stats(
            load_seconds=self._generation.load_seconds,
            prompt_tokens=len(self.prompt),
            prompt_seconds=self._read - self._started,
            generated_tokens=len(reply.tokens),
            generation_seconds=time.perf_counter() - self._first,
            peak_resident=memory.peak_resident,
            anonymous=memory.anonymous,
            cached_tokens=self._cached,
        )
        log_probs = tuple(self._sampler.log_probs)
        return Completion(reply.text, tuple(reply.tokens), reply.finish_reason, stats, log_probs, reply.stop_string)

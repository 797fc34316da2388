"""`Engine`, the Python API of a loaded model: logits, generation, batches, beam search. Knows no backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fiddler.errors import RequestError, path_of, quoted
from fiddler.files.model_file import ModelFile
from fiddler.generation.beam_hypotheses import BeamOptions, EarlyStopping
from fiddler.generation.beam_search import Beam, BeamSearch
from fiddler.generation.completion import Completion
from fiddler.generation.drivers import Outcome, new_scheduler, run_all
from fiddler.generation.request import (
    CheckedPrompt,
    Request,
    check_request,
    checked_ids,
    checked_request,
    checked_sampling,
    token_ids,
    whole_number,
)
from fiddler.generation.sampled_text import Generation
from fiddler.generation.scheduler import Scheduler
from fiddler.host_memory import in_memory
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner
from fiddler.sampling.constraint import Constraint, Vocabulary
from fiddler.sampling.sampler import Sampler, Sampling
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Engine"]


class Engine:
    """A loaded model. Several threads may use it at once: their steps come in turn."""

    def __init__(
        self,
        model_file: ModelFile,
        tokenizer: Tokenizer,
        runner: Runner,
        device: str,
        where: str,
        backend: str,
        started: float,
    ) -> None:
        self._loaded: tuple[ModelFile, Runner] | None = (model_file, runner)
        self.config = model_file.config
        self.tokenizer = tokenizer
        self.device = device
        self.where = where  # one line: where it computes, and why
        self.backend = backend  # the kernel tier
        self.load_seconds = time.perf_counter() - started

    def __repr__(self) -> str:
        if self._loaded is None:
            return "Engine(closed)"
        name = self.model_file.file.path.name
        return f"Engine({name!r}, device={self.device!r}, context={self.context}, backend={self.backend!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory, that of a GPU too, and its mapping. Any use but this one raises RequestError then.

        Texts that are still being generated hold the memory until they end.
        """
        self._loaded = None
        self.__dict__.pop("_vocabulary", None)

    @property
    def model_file(self) -> ModelFile:
        """The open file. Raises RequestError when the engine is closed."""
        return self._opened[0]

    @property
    def runner(self) -> Runner:
        """Computes the steps. Raises RequestError when the engine is closed."""
        return self._opened[1]

    @property
    def _opened(self) -> tuple[ModelFile, Runner]:
        if self._loaded is None:
            raise RequestError("the engine is closed; load the model again")
        return self._loaded

    @property
    def context(self) -> int:
        """Positions that a sequence can have: as requested, at most as many as the model was trained with."""
        return self.runner.context

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every one of `ids`: float32 [T, V] on the CPU.

        Raises RequestError when `ids` are no token ids of the vocabulary or more than `context`.
        """
        ids = checked_ids(token_ids("ids", ids), self.config, self.context)
        sequence, chunk = self.runner.sequence(), self.runner.chunk
        rows = torch.empty(len(ids), self.config.vocab_size)
        for begin in range(0, len(ids), chunk):
            logits = self.runner.step([(sequence, ids[begin : begin + chunk])]).logits
            assert logits is not None
            rows[begin : begin + chunk] = logits
        return rows

    def start(
        self,
        request: Request,
        *,
        prompt_cache: str | Path | None = None,
        on_chunk: Callable[[int], None] = lambda read: None,
    ) -> Generation:
        """Check a request and prepare it; nothing is computed until the result is iterated.

        prompt_cache: a file that stores the prompt's keys and values for other processes, see
        `fiddler.runtime.kv_cache_file`; it is read now, and written after the prompt was read. on_chunk: called between
        prefill chunks with the prompt's tokens read so far, while the result is iterated; may raise to cancel.
        Raises RequestError when the prompt and `max_tokens` together exceed the context, or make no sense.
        """
        check_request(request)
        ids, limit = checked_request(request, self.tokenizer, self.config, self.context)
        new_sampler = self._samplers(request)
        checked = self._checked(request, ids, limit, prompt_cache)
        return Generation(self.runner, self.tokenizer, checked, new_sampler, self.load_seconds, on_chunk)

    def _samplers(self, request: Request) -> Callable[[], Sampler]:
        """Makes samplers, one a generation. Raises RequestError where one cannot be made for this model."""
        sampling, constraint = checked_sampling(request, self.tokenizer, self.config), request.constraint
        pieces = self._pieces if sampling.dry_multiplier else ()
        if constraint is None:
            return lambda: Sampler(sampling, pieces)
        if not isinstance(constraint, Constraint):
            raise RequestError(f"the constraint is {quoted(constraint)}; make one with fiddler.Constraint")
        guide = self._vocabulary.guide(constraint)
        return lambda: Sampler(sampling, pieces, guide.copy())

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        special: bool = False,
        reuse: bool = True,
    ) -> Iterator[str]:
        """The continuation of `prompt` as pieces of text, as they come. See `Request` and `start`."""
        request = Request(prompt, _or_default(sampling), max_tokens, stop, ignore_eos, constraint, special, reuse)
        return iter(self.start(request))

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        special: bool = False,
        reuse: bool = True,
    ) -> Completion:
        """The whole continuation of `prompt`. Arguments and errors: see `Request` and `start`."""
        request = Request(prompt, _or_default(sampling), max_tokens, stop, ignore_eos, constraint, special, reuse)
        return self.start(request).run()

    def batch(
        self,
        requests: Iterable[str | Sequence[int] | Request | Generation | BeamSearch],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        parallel: int | None = None,
        on_step: Callable[[int, int], None] = lambda generated, sequences: None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Run many requests at once: (index, completion or error) of each as it finishes.

        requests: prompts, which are continued with the other arguments; requests of their own; or what `start` and
        `start_beams` return. A beam search counts as so many sequences and ends with a `BeamResult`. A prompt that
        cannot run gives its RequestError; the others run.

        Their texts do not depend on each other, beyond rounding; an expert that several chose is read once a step.
        They are taken from the iterable when there is memory for them, so it may prepare them one by one.
        parallel: limit of the sequences at once, see `scheduler`. Fewer run where the KV caches of all would exceed
        half of the memory beside the model. on_step: called after each step with the tokens generated so far and the
        number of sequences in the step.
        Raises RequestError when `parallel`, `sampling`, `max_tokens` or `stop` make no sense.
        """
        single = isinstance(requests, str | bytes | Request) or getattr(requests, "ndim", 1) == 0  # an array of one
        if single or not isinstance(requests, Iterable):
            raise RequestError(f"requests are {quoted(requests)}; give a list of prompts or requests")
        defaults, scheduler = Request("", _or_default(sampling), max_tokens, stop, ignore_eos), self.scheduler(parallel)
        return run_all(scheduler, (self._prepared(request, defaults) for request in requests), on_step)

    def scheduler(self, parallel: int | None = None) -> Scheduler:
        """A scheduler for what `start` returns; see `new_scheduler`. Raises RequestError for less than one sequence."""
        parallel = None if parallel is None else whole_number("parallel", parallel)
        if parallel is not None and parallel < 1:
            raise RequestError(f"parallel is {quoted(parallel)}; give at least 1")
        return new_scheduler(self.runner, parallel, self._mapped_bytes)

    def _prepared(
        self, request: str | Sequence[int] | Request | Generation | BeamSearch, defaults: Request
    ) -> Generation | BeamSearch | RequestError:
        if isinstance(request, Generation | BeamSearch):
            return request
        try:
            return self.start(request if isinstance(request, Request) else replace(defaults, prompt=request))
        except RequestError as error:
            return error

    @property
    def _mapped_bytes(self) -> int:
        """Bytes of the file that memory must hold beside the KV caches; those of a file in memory are taken already."""
        file = self.model_file.file
        return 0 if in_memory(file.path) else sum(nbytes for _, nbytes in file.mappings)

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.tokenizer.pieces(special=True)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def start_beams(
        self,
        request: Request,
        options: BeamOptions,
        *,
        prompt_cache: str | Path | None = None,
    ) -> BeamSearch:
        """Check a beam search and prepare it; nothing is computed until it runs. Other arguments: see `start`.

        Raises RequestError as `start` does, and for a request with a constraint; its `sampling` has no meaning.
        """
        check_request(request)
        if not isinstance(options, BeamOptions):
            raise RequestError(f"the options are {quoted(options)}; give BeamOptions")
        if request.constraint is not None:
            raise RequestError("a beam search has no constraint; leave it out, or sample")
        ids, limit = checked_request(request, self.tokenizer, self.config, self.context)
        options.check(self.config.vocab_size, self.runner.kv_bytes(len(ids) + 1), self.runner.room(self._mapped_bytes))
        checked = self._checked(request, ids, limit, prompt_cache)
        return BeamSearch(self.runner, self.tokenizer, checked, options, request.ignore_eos, self.load_seconds)

    def beam_search(
        self,
        prompt: str | Sequence[int],
        width: int = 4,
        max_tokens: int | None = None,
        *,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        special: bool = False,
        reuse: bool = True,
    ) -> list[Beam]:
        """The finished beams of a search with `width` beams, best first, as transformers' `generate(num_beams=width)`.

        length_penalty, early_stopping: see `fiddler.generation.beam_hypotheses.BeamOptions`. Other arguments and
        errors: see `Request` and `start`.
        """
        options = BeamOptions(width, length_penalty, early_stopping)
        request = Request(prompt, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, special=special, reuse=reuse)
        return self.start_beams(request, options).run()

    def _checked(self, request: Request, ids: list[int], limit: int, prompt_cache: str | Path | None) -> CheckedPrompt:
        reuse, interactive = request.reuse or prompt_cache is not None, request.priority == "interactive"
        after = self._after_prompt(prompt_cache, ids)
        return CheckedPrompt(ids, limit, request.stop, reuse, interactive, after, request.named_tokens)

    def _after_prompt(self, prompt_cache: str | Path | None, ids: list[int]) -> Callable[[KVCache], None]:
        if prompt_cache is None:
            return lambda sequence: None
        from fiddler.runtime.kv_cache_file import resume_from

        return resume_from(path_of("prompt_cache", prompt_cache), self.model_file, self.runner, ids)


def _or_default(sampling: Sampling | None) -> Sampling:
    return Sampling() if sampling is None else sampling

"""`Engine`, the Python API of a loaded model: logits, generation, batches, beam search. Knows no backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fiddler.errors import RequestError
from fiddler.files.model_file import ModelFile
from fiddler.generation.batch_size import BatchSize, first_batch_size
from fiddler.generation.beam_hypotheses import BeamOptions, EarlyStopping
from fiddler.generation.beam_search import Beam, BeamSearch
from fiddler.generation.completion import Completion
from fiddler.generation.drivers import Outcome, run_all
from fiddler.generation.request import CheckedPrompt, checked_ids, checked_request
from fiddler.generation.sampled_text import Generation
from fiddler.generation.scheduler import Scheduler
from fiddler.generation.sequence_group import PreparedRequest
from fiddler.host_memory import in_memory
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner
from fiddler.sampling.constraint import Constraint, Vocabulary
from fiddler.sampling.sampler import Sampler, Sampling
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Engine"]


class Engine:
    """A loaded model. Not for several threads at once: the kernels are called from one thread."""

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
        self.model_file = model_file
        self.config = model_file.config
        self.tokenizer = tokenizer
        self.runner = runner
        self.device = device
        self.where = where  # one line: where it computes, and why
        self.backend = backend  # the kernel tier
        self.load_seconds = time.perf_counter() - started

    @property
    def context(self) -> int:
        """Positions that a sequence can have: as requested, at most as many as the model was trained with."""
        return self.runner.context

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every one of `ids`: float32 [T, V] on the CPU.

        Raises RequestError when an id is outside the vocabulary or there are more ids than `context`.
        """
        ids = checked_ids(ids, self.config, self.context)
        sequence, chunk = self.runner.sequence(), self.runner.chunk
        rows = torch.empty(len(ids), self.config.vocab_size)
        for begin in range(0, len(ids), chunk):
            logits = self.runner.step([(sequence, ids[begin : begin + chunk])]).logits
            assert logits is not None
            rows[begin : begin + chunk] = logits
        return rows

    def start(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        prompt_cache: str | Path | None = None,
        reuse: bool | None = None,
        on_chunk: Callable[[int], None] = lambda read: None,
    ) -> Generation:
        """Check a request and prepare it; nothing is computed until the result is iterated.

        prompt: text, which gets a BOS where the model's metadata say so, or token ids, taken as they are.
        max_tokens: None goes on until an end token or the end of the context. `stop`: strings that end the text,
        not included. `ignore_eos`: end tokens are never chosen. `constraint`: a language that the text must follow;
        the text ends where that is complete. `reuse`: the common prefix with the last prompt is not computed again,
        which may change roundings; None does so unless the temperature is 0 or there is a seed, that is, unless the
        request should be repeatable. `prompt_cache`: a file that stores the prompt's keys and values for other
        processes, see `fiddler.runtime.kv_cache_file`; it is read now, and written after the prompt was read. on_chunk:
        called between prefill chunks with the prompt's tokens read so far, while the result is iterated; may raise to
        cancel.
        Raises RequestError when the prompt and `max_tokens` together exceed the context, or make no sense.
        """
        ids, limit = checked_request(prompt, max_tokens, stop, self.tokenizer, self.config, self.context)
        new_sampler = self.samplers(sampling, constraint, ignore_eos)
        if reuse is None:
            reuse = prompt_cache is not None or not (sampling or Sampling()).repeatable
        checked = CheckedPrompt(ids, limit, stop, reuse, self._after_prompt(prompt_cache, ids))
        return Generation(self.runner, self.tokenizer, checked, new_sampler, self.load_seconds, on_chunk)

    def samplers(
        self, sampling: Sampling | None = None, constraint: Constraint | None = None, ignore_eos: bool = False
    ) -> Callable[[], Sampler]:
        """A function that makes a sampler for this model, one a generation. Arguments: see `start`.

        Raises RequestError where `sampling` is for another vocabulary or nothing can follow the constraint.
        """
        sampling = sampling or Sampling()
        bad = next((token for token in sampling.logit_bias if token >= self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"logit_bias is for token {bad}, outside the vocabulary of {self.config.vocab_size}")
        if ignore_eos:
            banned = dict.fromkeys(self.tokenizer.end_ids, -math.inf)
            sampling = replace(sampling, logit_bias={**sampling.logit_bias, **banned})
        pieces = self._pieces if sampling.dry_multiplier else ()
        if constraint is None:
            return lambda: Sampler(sampling, pieces)
        guide = self._vocabulary.guide(constraint)
        return lambda: Sampler(sampling, pieces, guide.copy())

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        reuse: bool | None = None,
    ) -> Iterator[str]:
        """The continuation of `prompt` as pieces of text, as they come. Arguments and errors: see `start`."""
        return iter(
            self.start(
                prompt, sampling, max_tokens, stop=stop, ignore_eos=ignore_eos, constraint=constraint, reuse=reuse
            )
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        reuse: bool | None = None,
    ) -> Completion:
        """The whole continuation of `prompt`. Arguments and errors: see `start`."""
        generation = self.start(
            prompt, sampling, max_tokens, stop=stop, ignore_eos=ignore_eos, constraint=constraint, reuse=reuse
        )
        for _ in generation:
            continue
        return generation.completion

    def batch(
        self,
        generations: Iterable[PreparedRequest],
        parallel: int | None = None,
        *,
        on_step: Callable[[int, int], None] = lambda generated, sequences: None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Run many generations at once, as `start` returns them: (index, completion or error) of each as it finishes.

        Searches of `start_beams` may be among them: each counts as so many sequences and ends with a `BeamResult`.

        Their texts do not depend on each other, beyond rounding; an expert that several chose is read once a step.
        They are taken from the iterable when there is memory for them, so it may prepare them one by one.
        parallel: limit of the sequences at once; None starts at the batch size where every expert is read each step,
        and doubles it as long as that gives more tokens a second. Fewer run where the KV caches of all would exceed
        half of the memory beside the model. on_step: called after each step with the tokens generated so far and the
        number of sequences in the step.
        Raises RequestError when `parallel` makes no sense.
        """
        if parallel is not None and parallel < 1:
            raise RequestError(f"parallel is {parallel}; give at least 1")
        limit = self.runner.chunk if parallel is None else min(parallel, self.runner.chunk)
        first = first_batch_size(self.config.expert_count, self.config.expert_used_count) if parallel is None else limit
        file = self.model_file.file
        weights = 0 if in_memory(file.path) else sum(nbytes for _, nbytes in file.mappings)
        scheduler = Scheduler(self.runner, BatchSize(min(first, limit), limit), self.runner.room(weights))
        return run_all(scheduler, generations, on_step)

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.tokenizer.pieces(special=True)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def start_beams(
        self,
        prompt: str | Sequence[int],
        options: BeamOptions,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        prompt_cache: str | Path | None = None,
        reuse: bool = False,
    ) -> BeamSearch:
        """Check a beam search and prepare it; nothing is computed until it runs. Arguments and errors: see `start`."""
        ids, limit = checked_request(prompt, max_tokens, stop, self.tokenizer, self.config, self.context)
        reuse = reuse or prompt_cache is not None
        checked = CheckedPrompt(ids, limit, stop, reuse, self._after_prompt(prompt_cache, ids))
        return BeamSearch(self.runner, self.tokenizer, checked, options, ignore_eos, self.load_seconds)

    def beam_search(
        self,
        prompt: str | Sequence[int],
        width: int = 4,
        max_tokens: int | None = None,
        *,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        reuse: bool = False,
    ) -> list[Beam]:
        """The finished beams of a search with `width` beams, best first, as transformers' `generate(num_beams=width)`.

        length_penalty, early_stopping: see `fiddler.generation.beam_hypotheses.BeamOptions`. Other arguments and
        errors: see `start`.
        """
        options = BeamOptions(width, length_penalty, early_stopping)
        return self.start_beams(prompt, options, max_tokens, stop=stop, ignore_eos=ignore_eos, reuse=reuse).run()

    def _after_prompt(self, prompt_cache: str | Path | None, ids: list[int]) -> Callable[[KVCache], None]:
        if prompt_cache is None:
            return lambda sequence: None
        from fiddler.runtime.kv_cache_file import resume_from

        return resume_from(Path(prompt_cache), self.model_file, self.runner, ids)

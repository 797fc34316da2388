"""One step of the model over flat tokens of one or several sequences. Knows no text and no sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.errors import ResourceError
from fiddler.models.transformer import Transformer
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.step import Step

__all__ = ["Runner", "StepOutput", "out_of_memory"]

_TORCH_PARALLEL_FROM = 1 << 22  # multiplications of attention a layer; fewer take less than a millisecond on one core


class StepOutput(NamedTuple):
    """Results of a step, one row for each wanted token.

    `hidden`: hidden states [W, D], on the model's device; where graphs compute them, valid until the next step.
    `logits`: float32 [W, V] on the CPU; None where the step was to compute none. `largest`: int64 [W], the first token
    of each row's largest logit, or -1 where not all of them are finite; None where the caller is to look for it.
    """

    hidden: Tensor
    logits: Tensor | None
    largest: np.ndarray | None = None


class Runner(ABC):
    """Runs steps on `threads` threads. `chunk`: the most tokens of a prompt that one step appends to a sequence.

    `lock`: held by a thread while it uses the runner or what the runner remembers; others wait.
    """

    shares = False
    """Whether several sequences may have the same memory, see `share`."""

    def __init__(
        self, model: Transformer, context: int, cache_dtype: torch.dtype, threads: int, chunk: int = 512
    ) -> None:
        self.model = model
        self.threads = threads
        self.context = context
        self.chunk = chunk
        self.cache_dtype = cache_dtype
        self.lock = RLock()

    @abstractmethod
    def sequence(self, positions: int = 0) -> KVCache:
        """A new, empty sequence that will have so many positions, or more."""

    @abstractmethod
    def sequences(self, count: int, positions: int) -> list[KVCache]:
        """`count` new, empty sequences of at most so many positions each; fewer, but one, where memory is short."""

    @abstractmethod
    def kv_bytes(self, positions: int) -> int:
        """KV cache of a new sequence with memory for `positions` [bytes]."""

    @abstractmethod
    def room(self, weights: int) -> int | None:
        """Bytes that KV caches may take in all, beside `weights` bytes of mapped files; None: no limit."""

    @abstractmethod
    def matched(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` need no memory and need not be computed again."""

    @abstractmethod
    def resume(self, ids: Sequence[int], positions: int = 0) -> KVCache:
        """A sequence that has the longest known prefix of `ids`, never all of them; an empty one without `ids`.

        positions: that it will have, or more.
        """

    def kv_used(self, enough: int = 0) -> int | None:
        """KV cache of the sequences in use [bytes], a shared part once; None where each has its own from the start.

        What `resume` alone might find is not in it: that gives way. enough: where it is no more than that, it may be
        less than is returned, which is no more than that, either: counting takes time.
        """
        del enough
        return None

    def kv_taken(self) -> int:
        """Memory that KV caches have taken so far, those of past sequences included [bytes]; 0 where unknown."""
        return 0

    def past_blocks(self) -> int:
        """Blocks of past sequences that `resume` may find, those in a host store included; 0 where there are none."""
        return 0

    def past_bytes(self) -> int:
        """Host memory by which `resume` finds them, keys and values aside [bytes]: an estimate."""
        return 0

    @abstractmethod
    def keep(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Remember `sequence`, which its user gives up, for `resume`; it holds the first of `tokens`."""

    def share(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Where it `shares`, let `resume` find the first of `tokens` in `sequence`, which is still in use."""
        del sequence, tokens

    @abstractmethod
    def forget(self) -> None:
        """Forget all sequences that `resume` might find."""

    def resident_experts(self) -> list[list[int]]:
        """The experts of each layer with experts that lie on a GPU now; no layers where there is none."""
        return []

    @abstractmethod
    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> KVCache:
        """A sequence with the positions of `source`, of which `target`, which is given up, has the first `shared`."""

    def step(
        self,
        parts: Sequence[tuple[KVCache, Sequence[int]]],
        wanted: Sequence[int] | None = None,
        *,
        logits: bool = True,
        greedy: bool = False,
    ) -> StepOutput:
        """Append tokens to sequences, all in one pass. Rows of the result are in the order of `parts`.

        wanted: the rows to return, in rising order; None: all, [T]. The last layer computes its experts for these rows
        only; for none it stores keys and values, and that is all.
        logits: whether to compute logits of these rows. Where a step fails, no sequence has grown.
        greedy: of one token of one sequence: the next one will probably be that of the largest logit, and the hidden
        state is not needed; so a GPU may begin the next step at once.
        """
        with self.lock:
            return self.compute(parts, wanted, logits=logits, greedy=greedy)

    def compute(
        self,
        parts: Sequence[tuple[KVCache, Sequence[int]]],
        wanted: Sequence[int] | None,
        *,
        logits: bool,
        greedy: bool = False,
    ) -> StepOutput:
        """`step`, for a thread that holds the lock."""
        del greedy  # a CPU has nothing to do meanwhile
        device = self.model.token_embd.device
        ids = torch.tensor([token for _, tokens in parts for token in tokens], dtype=torch.int64, device=device)
        subset = wanted is not None and len(wanted) < len(ids)
        rows = torch.tensor(wanted, dtype=torch.int64, device=device) if subset else None
        with out_of_memory():
            step = self._place([(sequence, len(tokens)) for sequence, tokens in parts])
            attention = 2 * step.seen_by_torch * self.model.config.head_count * self.model.config.head_dim
            with torch.inference_mode(), self._on_threads(attention):
                hidden = self._forward(ids, step, rows)
            output = self._output(hidden) if logits else StepOutput(hidden, None)
        step.commit()
        return output

    def _output(self, hidden: Tensor) -> StepOutput:
        """The results of a step that is to compute logits."""
        return StepOutput(hidden, self.logits(hidden))

    def _forward(self, ids: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        """Run the model: hidden states [T, D], or [W, D]."""
        return self.model(ids, step, wanted)

    def _place(self, parts: Sequence[tuple[KVCache, int]]) -> Step:
        """A `Step` of sequences and the numbers of their new tokens, with memory reserved for them."""
        return Step(parts, self.model.config)

    def step_seconds(self) -> Curve | None:
        """Seconds of a step by its number of tokens, from measured costs; None where nothing was measured."""
        return None

    @contextmanager
    def timing(self, parts: Sequence[tuple[KVCache, int]]) -> Iterator[Step]:
        """A step of sequences and the numbers of their new tokens that is never committed, on this runner's threads."""
        step = self._place(parts)
        with torch.inference_mode(), self._on_threads(0):
            yield step

    def prefill(self, sequence: KVCache, tokens: Sequence[int]) -> Tensor:
        """Append a prompt, chunk by chunk: float32 logits [V] after its last token."""
        assert tokens, "a prompt has at least one token"
        sequence.reserve(sequence.length + len(tokens))  # at once: growing by steps would copy, and leave holes
        last = (len(tokens) - 1) // self.chunk * self.chunk
        for begin in range(0, last, self.chunk):
            self.step([(sequence, tokens[begin : begin + self.chunk])], wanted=())
        logits = self.step([(sequence, tokens[last:])], wanted=[len(tokens) - last - 1]).logits
        assert logits is not None
        return logits[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V], float32 on the CPU."""
        if not len(hidden):
            return torch.empty(0, self.model.config.vocab_size)
        # torch gets all threads: its work here is too small to change their number twice a token
        with torch.inference_mode(), self._on_threads(_TORCH_PARALLEL_FROM):
            return self.model.logits(hidden).float().cpu()

    @contextmanager
    def _on_threads(self, attention: int) -> Iterator[None]:
        """Run on this runner's threads, and restore the process's settings afterwards.

        `attention`: multiplications of torch's part of the attention in a layer. Where they are few, torch gets one
        thread: on a busy machine, waiting for other threads costs more.
        """
        before = kernels.thread_count(), torch.get_num_threads()
        threads = self.threads if attention >= _TORCH_PARALLEL_FROM else 1
        kernels.set_threads(self.threads)
        if threads != before[1]:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            kernels.set_threads(before[0])
            if threads != before[1]:
                torch.set_num_threads(before[1])


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns the RuntimeError that torch raises where the CPU's memory does not suffice into a ResourceError."""
    try:
        yield
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("out of memory; close other programs, lower --ctx or shorten the prompts") from error

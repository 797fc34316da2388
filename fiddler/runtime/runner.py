"""One step of the model over flat tokens of one or several sequences. Knows no text and no sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fiddler import kernels
from fiddler.errors import ResourceError
from fiddler.host_memory import available_memory, memory_for_sequences
from fiddler.models.mixtral import Mixtral
from fiddler.runtime.kv_cache import KVCache, Step, kv_bytes
from fiddler.runtime.prefix_cache import PrefixCache

__all__ = ["Runner", "out_of_memory"]

_TORCH_PARALLEL_FROM = 1 << 22  # multiplications of attention a layer; fewer take less than a millisecond on one core


class Runner:
    """Runs steps on `threads` threads; `chunk`: the most tokens a sequence is given at once as a prompt is read."""

    def __init__(self, model: Mixtral, context: int, cache_dtype: torch.dtype, threads: int, chunk: int = 512) -> None:
        self.model = model
        self.threads = threads
        self.context = context
        self.chunk = chunk
        self.cache_dtype = cache_dtype
        self.prefix_cache = PrefixCache()

    def sequence(self, positions: int = 0) -> KVCache:
        """A new, empty sequence, with room for so many positions; it grows where it gets more."""
        made = KVCache(self.model.config, self.context, self.cache_dtype, self.model.token_embd.device)
        if positions:
            with out_of_memory():
                made.reserve(positions)
        return made

    def kv_bytes(self, positions: int) -> int:
        """Bytes of keys and values of a `sequence` with room for so many positions."""
        return kv_bytes(self.model.config, self.context, self.cache_dtype, positions)

    def room(self, weights: int) -> int | None:
        """Bytes that sequences may have in all, beside weights in so many bytes of mapped files; None: any number."""
        return memory_for_sequences(available_memory(), weights)

    def resume(self, ids: Sequence[int]) -> KVCache:
        """A sequence for `ids`: the kept one with what it has of their beginning, never all of them, or a new one."""
        return self.prefix_cache.take(ids) or self.sequence()

    def keep(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Have `resume` go on from `sequence`, which its user is done with; it holds the first of `tokens`."""
        self.prefix_cache.put(sequence, tokens)

    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> KVCache:
        """`target`, or else a new sequence, with all that `source` holds; see `KVCache.become`."""
        target = self.sequence() if target is None else target
        with out_of_memory():
            target.become(source, shared)
        return target

    def step(self, parts: Sequence[tuple[KVCache, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        """Append tokens to sequences, all in one pass: hidden states of all tokens, [T, D], in the order given.

        wanted: the rows of that which are returned, in rising order: [W, D]. None: all. The last layer's experts
        compute no others.
        """
        device = self.model.token_embd.device
        ids = torch.tensor([token for _, tokens in parts for token in tokens], dtype=torch.int64, device=device)
        some = wanted is not None and len(wanted) < len(ids)
        rows = torch.tensor(wanted, dtype=torch.int64, device=device) if some else None
        with out_of_memory():
            step = self._place([(sequence, len(tokens)) for sequence, tokens in parts])
            attention = 2 * step.seen_by_torch * self.model.config.head_count * self.model.config.head_dim
            with torch.inference_mode(), self._on_threads(attention):
                hidden = self._forward(ids, step, rows)
        step.commit()
        return hidden

    def _forward(self, ids: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        """The model's step."""
        return self.model(ids, step, wanted)

    def _place(self, parts: Sequence[tuple[KVCache, int]]) -> Step:
        """Room for so many more tokens of each sequence."""
        return Step(parts, self.model.config)

    def prefill(
        self, sequence: KVCache, tokens: Sequence[int], on_chunk: Callable[[int], None] = lambda read: None
    ) -> Tensor:
        """Append a prompt, a chunk at a time: float32 logits [V] after its last token.

        on_chunk: is told between two of them how many tokens were read; what it raises ends this.
        """
        assert tokens, "a prompt has at least one token"
        sequence.reserve(sequence.length + len(tokens))  # at once: growing by steps would copy, and leave holes
        hidden = None
        for begin in range(0, len(tokens), self.chunk):
            if begin:
                on_chunk(begin)
            part = tokens[begin : begin + self.chunk]
            hidden = self.step([(sequence, part)], wanted=[len(part) - 1])
        assert hidden is not None
        return self.logits(hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V], float32 on the CPU."""
        # torch keeps its threads: it has nothing to do here that is worth changing them twice a token
        with torch.inference_mode(), self._on_threads(_TORCH_PARALLEL_FROM):
            return self.model.logits(hidden).float().cpu()

    @contextmanager
    def _on_threads(self, attention: int) -> Iterator[None]:
        """Run on this runner's threads, and leave the process's settings as they were.

        `attention`: the multiplications of attention in a layer, torch's share of a step. Where it is little, torch
        gets one thread: on a busy machine, waiting for the others costs more.
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
    """What torch raises as any other error where the CPU's memory does not suffice, as one that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("out of memory; close other programs, lower --ctx or shorten the prompts") from error

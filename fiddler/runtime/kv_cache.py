"""KV caches, each of one sequence, and steps that append to several of them at once. Knows no model.

On the CPU, one call of our kernel computes the attention of all sequences that get one new position. Torch computes
the attention of sequences that get more positions, and of all sequences on other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.models.attention import attend
from fiddler.models.config import Config
from fiddler.models.rotary import rotary_cos_sin, rotary_frequencies, rotate

__all__ = ["KVCache", "Step", "kv_bytes"]

_FIRST_CAPACITY = 256  # positions; doubled when full


class KVCache:
    """Keys and values of one sequence, all layers. Memory grows with its length, up to `context` positions."""

    def __init__(
        self,
        config: Config,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        """`storage`: memory to reuse, of a sequence that is no longer used."""
        self.context = context
        self.length = 0
        self._config = config
        self._heads, self._head_dim = config.head_count_kv, config.head_dim
        self.device, self._dtype = device, dtype
        empty = [self._empty(0) for _ in range(config.block_count)]
        self._keys, self._values = (empty, list(empty)) if storage is None else storage
        if config.latent is not None:  # one memory for both
            self._values = self._keys
        self._memories = (self._keys,) if config.latent is not None else (self._keys, self._values)
        self._capacity = min(tensor.shape[1] for tensor in (*self._keys, *self._values))  # positions
        self._arrays: list[tuple[np.ndarray, np.ndarray]] | None = None
        self._pointers: kernels.KVPointers | None = None
        self.frequencies = rotary_frequencies(config, torch.device("cpu")).numpy()

    @property
    def storage(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [G, capacity, head_dim]; in latent attention they are the same tensors."""
        return self._keys, self._values

    def reserve(self, length: int) -> None:
        """Make room for positions up to `length`."""
        assert length <= self.context, f"{length} positions in a context of {self.context}"
        if length <= self._capacity:
            return
        present = min(tensor.shape[1] for tensor in (*self._keys, *self._values)) if self.length else 0
        capacity = _capacity_for(length, self.context, present)  # an empty one gets no more than a new one
        self._capacity = 0  # if an allocation fails, layers differ in capacity and must grow again
        self._arrays = self._pointers = None  # they point to the old memory
        for layer in range(len(self._keys)):
            grown = [self._empty(capacity) for _ in self._memories]
            for memory, new in zip(self._memories, grown, strict=True):
                new[:, : self.length] = memory[layer][:, : self.length]
            for memory, new in zip(self._memories, grown, strict=True):
                memory[layer] = new
        self._capacity = capacity

    def divided(self, count: int, length: int) -> list[KVCache]:
        """`count` empty sequences of at most `length` positions each, in this one's memory.

        The memory is theirs from now on: hold this sequence until they are no longer used, and do not use it.
        """
        self.reserve(count * length)
        size = self._heads * length * self._head_dim

        def parts(layers: list[Tensor], index: int) -> list[Tensor]:
            flat = (tensor.view(-1)[index * size : (index + 1) * size] for tensor in layers)
            return [tensor.view(self._heads, length, self._head_dim) for tensor in flat]

        return [
            KVCache(self._config, length, self._dtype, self.device, (parts(self._keys, i), parts(self._values, i)))
            for i in range(count)
        ]

    def _as_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Every layer's keys and values as the kernel takes them, in the same memory; none on other devices."""
        if self.device.type != "cpu":
            return []
        return [(_array(keys), _array(values)) for keys, values in zip(self._keys, self._values, strict=True)]

    def arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys and values as the kernel takes them, on the CPU."""
        if self._arrays is None:
            self._arrays = self._as_arrays()
        return self._arrays[layer]

    @property
    def pointers(self) -> kernels.KVPointers:
        """Pointers to every layer's keys and values, on the CPU."""
        if self._pointers is None:
            arrays = self._as_arrays()
            self._pointers = kernels.KVPointers([keys for keys, _ in arrays], [values for _, values in arrays])
        return self._pointers

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [n, G, head_dim] behind the end, without moving it; all so far, [S, G, head_dim].

        In latent attention the keys alone, which are the values, too.
        """
        end = self.length + keys.shape[0]
        stored = [memory[layer].transpose(0, 1) for memory in self._memories]  # [capacity, G, head_dim]
        for target, new in zip(stored, (keys, values), strict=False):
            target[self.length : end] = new
        return stored[0][:end], stored[-1][:end]

    def become(self, other: KVCache, shared: int = 0) -> None:
        """Copy `other`, from its position `shared` on: the positions before are the same in both."""
        assert shared <= min(self.length, other.length)
        self.length = shared  # positions that `reserve` copies, and that stay valid where it fails
        self.reserve(min(other.length + _FIRST_CAPACITY, self.context))  # else it would grow at the next step
        for targets, sources in zip(self._memories, other._memories, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target[:, shared : other.length] = source[:, shared : other.length]
        self.length = other.length

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def _empty(self, capacity: int) -> Tensor:
        """[G, capacity, head_dim]: the positions of one head lie together."""
        return torch.empty(self._heads, capacity, self._head_dim, dtype=self._dtype, device=self.device)


class Step:
    """Tokens appended to one or several sequences in one pass through the model: the model's `Cache`."""

    def __init__(self, parts: Sequence[tuple[KVCache, int]], config: Config) -> None:
        """`parts`: each sequence with the number of its tokens, in the order of the step's rows."""
        assert len({id(sequence) for sequence, _ in parts}) == len(parts), "a sequence stands twice in a step"
        for sequence, count in parts:
            sequence.reserve(sequence.length + count)
        self._parts = parts
        self._config = config
        ends = list(accumulate(count for _, count in parts))
        begins = [end - count for end, (_, count) in zip(ends, parts, strict=True)]
        by_kernel = [
            i
            for i, (sequence, count) in enumerate(parts)
            if count == 1
            and sequence.device.type == "cpu"
            and config.latent is None  # the kernel writes keys and values
        ]
        self._by_kernel, self._kernel_rows = [parts[i][0] for i in by_kernel], [begins[i] for i in by_kernel]
        by_torch = sorted(set(range(len(parts))) - set(by_kernel))
        self._by_torch = [(parts[i][0], slice(begins[i], ends[i])) for i in by_torch]

    @property
    def seen_by_torch(self) -> int:
        """Pairs of a query and a key position in torch's part of the attention, masked ones included."""
        return sum(
            (sequence.length + rows.stop - rows.start) * (rows.stop - rows.start) for sequence, rows in self._by_torch
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Implements `Cache.attend`: rotate, store, attend; each row attends to its own sequence."""
        if not self._by_torch:
            return self._attend_by_kernel(layer, q, k, v)
        out = torch.empty_like(q)
        if self._by_kernel:
            out[self._kernel_rows] = self._attend_by_kernel(layer, *(tensor[self._kernel_rows] for tensor in (q, k, v)))
        for sequence, rows in self._by_torch:
            cos_sin = self._cos_sin[rows]
            keys, values = sequence.write(layer, rotate(k[rows], cos_sin), v[rows])
            out[rows] = attend(rotate(q[rows], cos_sin), keys, values, self._config.sliding_window)
        return out

    def _attend_by_kernel(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the sequences that get one position each."""
        keys, values = zip(*(sequence.arrays(layer) for sequence in self._by_kernel), strict=True)
        lengths = [sequence.length for sequence in self._by_kernel]
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        frequencies, window = self._by_kernel[0].frequencies, self._config.sliding_window
        output = kernels.attend_each(q.numpy(), k.numpy(), v.numpy(), keys, values, lengths, frequencies, window)
        return torch.from_numpy(output)

    @cached_property
    def _cos_sin(self) -> Tensor:
        """Cosines and sines that rotate the step's rows to their positions."""
        positions = [torch.arange(sequence.length, sequence.length + count) for sequence, count in self._parts]
        return rotary_cos_sin(self._config, torch.cat(positions).to(self._parts[0][0].device))

    def commit(self) -> None:
        """Lengthen the sequences by the step's tokens, once it went through every layer."""
        for sequence, count in self._parts:
            sequence.length += count


def kv_bytes(config: Config, context: int, dtype: torch.dtype, length: int) -> int:
    """KV cache of a new sequence that reserves `length` positions at once [bytes]."""
    row = config.head_count_kv * config.head_dim * dtype.itemsize
    memories = 2 if config.latent is None else 1
    return memories * config.block_count * row * _capacity_for(length, context)


def _capacity_for(length: int, context: int, present: int = 0) -> int:
    """Positions to allocate where `length` are needed and `present` are allocated."""
    return min(context, max(length, 2 * present, _FIRST_CAPACITY))


def _array(tensor: Tensor) -> np.ndarray:
    """Keys or values as the kernel takes them: float32, or the bits of float16."""
    array = tensor.numpy()
    return array.view(np.uint16) if array.dtype == np.float16 else array

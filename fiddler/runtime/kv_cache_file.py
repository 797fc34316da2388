"""A prompt's keys and values in a file, so that the next process need not compute them again: `--prompt-cache`.

As with llama.cpp's option of that name, the longest common prefix of prompt and file is read from the file, and the
file is written again where the prompt has more tokens. Knows sequences and files; not the text of the tokens. Nothing
but the checksums guards the contents: like a model, a file should come from someone you trust.

The format, little-endian throughout; every part is followed by its CRC-32 (uint32):

    header  8 bytes "fiddlrKV", uint32 version (1; 2 of latent attention), the numbers' type (2: float16, 4: float32,
            1: blocks of Q8_0),
            layers L, heads G, head_dim d, positions n; 32 bytes that identify the model (`ModelFile.fingerprint`)
    tokens  n int32
    then, for each layer, keys [G, n, d] (rotated) and values [G, n, d]; in latent attention the keys are the values,
    and stand there once (version 1 had them twice, and is refused). Of Q8_0, d numbers are d / 32 * 34 bytes.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fiddler.errors import FileFormatError, RequestError, quoted
from fiddler.files.atomic_file import check_space, check_target, whole_file
from fiddler.files.destination import find_destination
from fiddler.files.model_file import ModelFile
from fiddler.input_file import open_regular
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.prefix_cache import common
from fiddler.runtime.q8_0_rows import decoded, encoded, row_bytes
from fiddler.runtime.runner import Runner

__all__ = ["PromptCache", "resume_from"]

_MAGIC = b"fiddlrKV"
_HEADER = struct.Struct("<8s6I32s")
_CRC = struct.Struct("<I")
_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype("<f2"),
    torch.float32: np.dtype("<f4"),
    torch.uint8: np.dtype("u1"),
}
_NAMES = {1: "Q8_0", 2: "float16", 4: "float32"}


def resume_from(path: Path, model_file: ModelFile, runner: Runner, ids: Sequence[int]) -> Callable[[KVCache], None]:
    """Let `runner` resume `ids` from the file, if it holds more of them than the runner's prefix cache.

    Returns a function of the sequence that holds `ids`, which writes the file if it lacks some of them.
    Raises FileFormatError for a file that is damaged, of another model or no prompt cache, and RequestError or
    ResourceError where one could not be written.
    """
    cache = PromptCache(path, model_file, runner.cache_dtype)
    cached = common(cache.tokens, ids)
    if cached < len(ids):
        check_target(path, force=True)
        check_space(path, cache.nbytes(len(ids)))
    count = min(cached, len(ids) - 1)
    with runner.lock:
        if count > runner.matched(ids):
            sequence = runner.sequence(count)
            cache.read(sequence, count)
            runner.keep(sequence, ids[:count])
    return (lambda sequence: cache.write(sequence, ids)) if cached < len(ids) else lambda sequence: None


class PromptCache:
    """The file at `path`, for a model and the dtype of its KV cache; `tokens` is empty where there is no file.

    Raises FileFormatError, in one line that names the file, where there is one that is not this model's.
    """

    def __init__(self, path: Path, model_file: ModelFile, dtype: torch.dtype) -> None:
        to = find_destination(path)
        regular_or_null = to.mode is None or stat.S_ISREG(to.mode) or (stat.S_ISCHR(to.mode) and to.descriptor is None)
        if not regular_or_null:
            kind = "a directory" if stat.S_ISDIR(to.mode or 0) else "no file"
            raise RequestError(f"{path} is {kind}; a prompt cache is read again: name a file")
        self._path, self._dtype, config = path, _TYPES[dtype], model_file.config
        self._shape = config.block_count, config.head_count_kv, config.head_dim
        self._row_length = row_bytes(config.head_dim) if dtype == torch.uint8 else config.head_dim
        self._version, self._tensors = (1, 2) if config.latent is None else (2, 1)  # of the format; of a layer
        self._max_positions, self._fingerprint = config.context_length, model_file.fingerprint
        self.tokens: tuple[int, ...] = ()
        with self._opened() as file:
            if self._exists(file):
                self.tokens = self._read_tokens(file)

    def nbytes(self, positions: int) -> int:
        """Size of a file with `positions` positions [bytes]."""
        layers, heads, _ = self._shape
        block = heads * positions * self._row_length * self._dtype.itemsize + _CRC.size
        return _HEADER.size + _CRC.size + 4 * positions + _CRC.size + self._tensors * layers * block

    def read(self, sequence: KVCache, count: int) -> None:
        """Fill an empty sequence with the first `count` positions of the file.

        Raises FileFormatError where the file is damaged; the sequence must not be used then.
        """
        assert sequence.length == 0
        assert count <= len(self.tokens)
        sequence.reserve(count)
        (layers, heads, _), positions = self._shape, len(self.tokens)
        with self._opened() as file:
            if self._read_tokens(file) != self.tokens:
                raise self._damaged("was written anew meanwhile")
            for layer in range(layers):
                memories = [self._block(file, heads, positions, count) for _ in range(self._tensors)]
                keys, values = memories[0].to(sequence.device), memories[-1].to(sequence.device)
                sequence.write(layer, keys, values)
        sequence.advance(count)

    def write(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Replace the file, atomically, by one with `tokens` and their keys and values, which `sequence` holds.

        Raises ResourceError where the disk is full, FileFormatError where another kind of file has appeared there.
        """
        positions = len(tokens)
        assert sequence.length == positions
        with self._opened() as file:
            self._exists(file)
        with whole_file(self._path, force=True) as output:

            def put(data: bytes | memoryview) -> None:
                output.write(data)
                output.write(_CRC.pack(zlib.crc32(data)))

            put(_HEADER.pack(_MAGIC, self._version, self._dtype.itemsize, *self._shape, positions, self._fingerprint))
            put(np.array(tokens, "<i4").tobytes())
            for layer in range(self._shape[0]):
                for memory in sequence.stored(layer):
                    rows = memory[:positions].transpose(0, 1)
                    # what was decoded from Q8_0 has the same blocks again
                    block = (encoded(rows) if self._quantised else rows).cpu().numpy()
                    put(np.ascontiguousarray(block, self._dtype).data.cast("B"))

    @property
    def _quantised(self) -> bool:
        return self._dtype.itemsize == 1

    def _block(self, file: BinaryIO, heads: int, positions: int, count: int) -> torch.Tensor:
        """The next keys or values of the file: the first `count` positions, [count, heads, head_dim]."""
        data = self._part(file, heads * positions * self._row_length * self._dtype.itemsize)
        block = np.frombuffer(data, self._dtype).reshape(heads, positions, self._row_length)[:, :count]
        rows = torch.from_numpy(block.astype(self._dtype.newbyteorder("=")))
        if self._quantised:
            rows = decoded(rows)
        if not rows.isfinite().all():
            raise self._damaged("holds what is no number")
        return rows.transpose(0, 1)

    def _opened(self) -> BinaryIO:
        """The file, opened; an empty stream where there is none, since llama.cpp, too, takes an empty file for none."""
        try:
            return open_regular(self._path)
        except FileNotFoundError:
            return BytesIO()
        except OSError as error:
            raise RequestError(f"{self._path}: cannot be read: {error.strerror}; name another file") from None

    def _exists(self, file: BinaryIO) -> bool:
        """Whether the file has contents, which must be a prompt cache's; does not move the reading position."""
        magic = file.read(len(_MAGIC))
        file.seek(0)
        if magic and magic != _MAGIC:
            raise FileFormatError(f"{self._path}: is not a prompt cache; name another file")
        return bool(magic)

    def _read_tokens(self, file: BinaryIO) -> tuple[int, ...]:
        """The tokens, after a check of the header against the model and the size of the file."""
        _, version, itemsize, *shape, positions, fingerprint = _HEADER.unpack(self._part(file, _HEADER.size))
        if version != self._version:
            raise FileFormatError(
                f"{self._path}: is a prompt cache of version {version}, this is {self._version}; "
                "delete it or name another"
            )
        if fingerprint != self._fingerprint or tuple(shape) != self._shape:
            raise FileFormatError(f"{self._path}: is another model's prompt cache; delete it or name another file")
        if itemsize != self._dtype.itemsize:
            raise FileFormatError(
                f"{self._path}: is a prompt cache of {_NAMES.get(itemsize, quoted(itemsize))}, and this --precision or "
                f"--cache-type-k takes {_NAMES[self._dtype.itemsize]}; name another file"
            )
        if positions > self._max_positions or os.fstat(file.fileno()).st_size != self.nbytes(positions):
            raise self._damaged("is not as long as it says")
        return tuple(np.frombuffer(self._part(file, 4 * positions), "<i4").tolist())

    def _part(self, file: BinaryIO, nbytes: int) -> bytes:
        """The next part of the file, its checksum verified."""
        data, crc = file.read(nbytes), file.read(_CRC.size)
        if len(data) < nbytes or crc != _CRC.pack(zlib.crc32(data)):
            raise self._damaged("has a wrong checksum or no end")
        return data

    def _damaged(self, defect: str) -> FileFormatError:
        return FileFormatError(f"{self._path}: is a damaged prompt cache, which {defect}; delete it")

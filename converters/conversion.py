"""Hugging Face Mixtral folder -> GGUF: the order of steps, and each tensor's way from file to file.

Knows what llama.cpp expects of a Mixtral in GGUF (types, row order, metadata keys); does not print, and does
not know how the source is laid out (`checkpoint`), where the vocabulary comes from (`vocabulary`) or how a
file appears whole (`output_file`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gguf
import numpy as np

from fiddler.converters.checkpoint import Checkpoint, Dtype, Matrix
from fiddler.converters.dtypes import Lost, to_bits, to_float32
from fiddler.converters.safetensors_file import Array
from fiddler.converters.tokenizer.vocabulary import Vocabulary, read_vocabulary
from fiddler.errors import RequestError
from fiddler.files.atomic_file import check_space, check_target, whole_file
from fiddler.models.config import ARCHITECTURE

__all__ = ["ConversionReport", "convert", "interleave"]

_ALIGNMENT = 64  # of tensor data: a cache line. GGUF's 32 lets vectors lie across lines, up to a quarter slower
_PIECE = 1 << 18  # elements in work at once: with all temporaries some MB, which fit a cache (3x faster than 1 << 20)
_TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` wrote: a file of `nbytes` bytes and `tensors` tensors, in `seconds`.

    `overflowed` finite values became infinite and `flushed` others than zero became zero, as the chosen type
    cannot hold them; `warnings` are for the user, one line each.
    """

    path: Path
    nbytes: int
    tensors: int
    dtype: Dtype
    overflowed: int
    flushed: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the GGUF: where it comes from and what it becomes."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype | None  # None: float32
    heads: int  # whose rows are interleaved for RoPE; 0: rows stay in order

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype is None else 2)


def convert(
    source: str | Path,
    target: str | Path,
    dtype: Dtype | None = None,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert the Hugging Face Mixtral folder `source` to the GGUF file `target`, as llama.cpp reads it.

    `dtype` of the matrices defaults to the checkpoint's (bf16 for a float32 one); norms and routers are
    float32. `progress(done, total)` hears of tensor bytes written. The source is mapped and converted in
    pieces, so memory stays at some tens of MB however large the model is. The source must not be truncated
    meanwhile: like any mapped file that shrinks, it would end the process (SIGBUS).

    `target` appears when it is complete, or not at all (`whole_file` says what an interruption leaves).

    Raises CheckpointError for a source that cannot be converted, RequestError for a target that exists
    (without `force`) or cannot be written, ResourceError where the disk is too small.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in get_args(Dtype):
        raise RequestError(f"dtype is {dtype!r}; choose 'bf16' or 'f16'")
    out = target.resolve()  # through a symbolic link, its target is what gets written
    check_target(out, force=force)
    checkpoint = Checkpoint.open(source)
    _refuse_source_file(source, out)
    vocabulary = read_vocabulary(source, checkpoint.config.vocab_size)
    dtype = dtype or checkpoint.dtype
    tensors = _plan(checkpoint, dtype)
    total = sum(tensor.nbytes for tensor in tensors)
    check_space(out, total)

    lost, done = Lost(), 0
    with whole_file(out, force=force) as temporary:
        _write_header(temporary, checkpoint, vocabulary, dtype, tensors)
        with temporary.open("ab") as file:
            for tensor in tensors:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                begin = done
                for matrix in checkpoint.matrices(tensor.name):
                    for piece, cost in _pieces(matrix, tensor):
                        file.write(piece.data)
                        lost, done = lost + cost, done + piece.nbytes
                        if progress is not None:
                            progress(done, total)
                assert done - begin == tensor.nbytes
            file.write(bytes(-file.tell() % _ALIGNMENT))
            size = file.tell()
    return ConversionReport(
        path=target,
        nbytes=size,
        tensors=len(tensors),
        dtype=dtype,
        overflowed=lost.overflowed,
        flushed=lost.flushed,
        seconds=time.perf_counter() - started,
        warnings=checkpoint.warnings + vocabulary.warnings + _warnings(lost, dtype),
    )


def _refuse_source_file(source: Path, out: Path) -> None:
    """With `force`, the target must not be what is being read, by whatever name or link."""
    if out.exists():
        for path in source.iterdir():
            if path.suffix != ".gguf" and path.exists() and path.samefile(out):
                raise RequestError(f"{out} belongs to the checkpoint that is converted; name another file")


def _plan(checkpoint: Checkpoint, dtype: Dtype) -> list[_Tensor]:
    config = checkpoint.config
    heads = {"attn_q.weight": config.head_count, "attn_k.weight": config.head_count_kv}
    tensors = []
    for name, shape in config.tensor_shapes(tied=checkpoint.tied).items():
        narrow = len(shape) > 1 and not name.endswith("ffn_gate_inp.weight")
        inner = name.removeprefix("blk.").partition(".")[2]
        tensors.append(_Tensor(name, shape, dtype if narrow else None, heads.get(inner, 0)))
    return tensors


def _write_header(
    path: Path, checkpoint: Checkpoint, vocabulary: Vocabulary, dtype: Dtype, tensors: list[_Tensor]
) -> None:
    """Everything before the tensor data, into the existing file `path`."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_name(checkpoint.name)
        writer.add_file_type(_TYPES[dtype][1])
        writer.add_custom_alignment(_ALIGNMENT)
        for key, value in checkpoint.config.to_metadata().items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        vocabulary.write_to(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType.F32 if tensor.dtype is None else _TYPES[tensor.dtype][0]
            unused = np.dtype(np.uint16)  # beside a raw_dtype, only uint8 would mean something
            writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pieces(matrix: Matrix, tensor: _Tensor) -> Iterator[tuple[Array, Lost]]:
    """The rows of `matrix` as contiguous arrays of `tensor`'s type, in GGUF's order, and what that lost."""
    together = 1 if not tensor.heads else matrix.count // tensor.heads  # rows that must stay in one piece
    step = max(1, _PIECE // (matrix.width * together)) * together
    for start in range(0, matrix.count, step):
        rows = matrix.rows(start, min(start + step, matrix.count))
        if tensor.heads:
            rows = interleave(rows, together)
        if tensor.dtype is None:
            yield np.ascontiguousarray(to_float32(rows)), Lost()
        else:
            bits, lost = to_bits(rows, tensor.dtype)
            yield np.ascontiguousarray(bits), lost


def interleave(rows: Array, head_dim: int) -> Array:
    """Reorder whole heads' rows [heads * head_dim, D] from transformers' RoPE to ggml's (`ROPE_TYPE_NORM`).

    transformers rotates row `i` of a head with row `i + head_dim / 2`; ggml rotates neighbours. So row
    `2 i + j` of each head is what was row `j * head_dim / 2 + i`. q . k is the same either way, as both are
    reordered alike. llama.cpp's converter for Llama and Mixtral does the same.
    """
    pairs = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _warnings(lost: Lost, dtype: Dtype) -> tuple[str, ...]:
    found = []
    if lost.overflowed:
        remedy = "; convert with dtype bf16" if dtype == "f16" else ""
        found.append(f"{lost.overflowed} weights are too large for {dtype} and became infinite{remedy}")
    if lost.flushed:
        found.append(f"{lost.flushed} weights are too small for {dtype} and became zero")
    return tuple(found)

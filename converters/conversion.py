"""Converts a model, a Hugging Face folder or a GGUF, to a GGUF in 16 bits or quantised: each tensor from file to file.

Knows what llama.cpp expects of a model in GGUF (types, row order); does not print, and does not know the source's
layout and metadata (`checkpoint`, `gguf_source`) or atomic writes (`atomic_file`).
"""

from __future__ import annotations

import glob
import io
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from fiddler.converters.checkpoint import Checkpoint, Dtype
from fiddler.converters.dtypes import RangeLoss, loss_warnings
from fiddler.converters.gguf_source import GgufSource
from fiddler.converters.importance_matrix import ImportanceMatrix
from fiddler.converters.mixtures import Mixture, mixture_of, tensor_type
from fiddler.converters.source_folder import find_folder
from fiddler.converters.tensor_data import TargetTensor, pieces
from fiddler.errors import CheckpointError, FileFormatError, RequestError, path_of, quoted
from fiddler.files.atomic_file import OutputFile, check_space, check_target, whole_file
from fiddler.files.gguf_header import MAGIC
from fiddler.files.model_file import check_header
from fiddler.models.architecture import FLOATS, Role, Rotary

if TYPE_CHECKING:
    from fiddler.converters.quantisation import Quantiser

__all__ = ["ConversionReport", "convert"]

_ALIGNMENT = 64  # of tensor data [bytes]: a cache line. With GGUF's 32, vectors straddle lines: up to 1/4 slower
_PART = re.compile(r"(.*)-\d{5}(-of-\d{5}\.gguf)", re.DOTALL)  # of a split GGUF
_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}


@dataclass(frozen=True)
class ConversionReport:
    """Result of `convert`: a file of `nbytes` bytes and `tensors` tensors, written in `seconds`.

    `dtype`: "bf16", "f16", or the name of a mixture of quantised types.
    `overflowed` finite values became infinite and `flushed` non-zero values became zero: the chosen type cannot
    hold them. `warnings` are lines for the user.
    """

    path: Path
    nbytes: int
    tensors: int
    dtype: str
    overflowed: int
    flushed: int
    seconds: float
    warnings: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: Dtype | None = None,
    *,
    quantisation: str | None = None,
    imatrix: str | Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert `source`, a Hugging Face folder or a GGUF, to the GGUF file `target`, as llama.cpp reads it.

    A GGUF keeps its metadata; experts of a tensor each are stacked. `dtype` of the matrices defaults to the source's
    (bf16 for a float32 one); norms, biases and routers are float32. `quantisation` in its place: llama-quantize's name
    of a mixture of quantised types (`MIXTURES`), which all cores encode. Without both, gpt-oss's experts stay MXFP4.
    `imatrix`: an importance matrix (`ImportanceMatrix`), which weights the errors of the weights that are quantised.
    `progress(done, total)` receives the tensor bytes written. The source is converted in pieces, so memory stays at
    some tens of MB for a model of any size, but for transposed experts: DBRX's matrices, 132 MB.

    `target` appears only when it is complete (see `whole_file` for the traces of an interruption).

    Raises CheckpointError or FileFormatError for a source that cannot be converted or is cut short meanwhile, or an
    importance matrix that does not fit it,
    RequestError for a target that exists (without `force`) or cannot be written, ResourceError if the disk is too
    small.
    """
    started = time.perf_counter()
    source, target = path_of("the source", source), path_of("the target", target)
    _check_options(dtype, quantisation, imatrix, force)
    mixture = None if quantisation is None else mixture_of(quantisation)
    out = check_target(target, force=force)
    checkpoint = _open(source, out.path)
    weights = None if imatrix is None else ImportanceMatrix.open(path_of("the importance matrix", imatrix))
    tensors = _plan(checkpoint, mixture or dtype, weighted=weights is not None)
    missing = () if weights is None else _without_importance(weights, tensors)
    dtype = dtype or checkpoint.dtype
    header = _header(checkpoint, mixture or dtype, tensors, {} if weights is None else weights.metadata())
    nbytes = len(header) + sum(_padded(tensor.nbytes) for tensor in tensors)
    _check_opens(source, header, nbytes)
    check_space(target, nbytes)

    with ExitStack() as stack:
        file = stack.enter_context(whole_file(target, force=force))
        quantiser = None
        if mixture is not None:
            from fiddler.converters.quantisation import Quantiser  # late: imports Numba

            quantiser = stack.enter_context(Quantiser())
        file.write(header)
        loss = _write(file, checkpoint, tensors, (quantiser, weights), progress)
    return ConversionReport(
        path=target,
        nbytes=nbytes,
        tensors=len(tensors),
        dtype=dtype if mixture is None else mixture.name,
        overflowed=loss.overflowed,
        flushed=loss.flushed,
        seconds=time.perf_counter() - started,
        warnings=checkpoint.warnings + missing + loss_warnings(loss, dtype),
    )


def _write(
    file: OutputFile,
    checkpoint: Checkpoint | GgufSource,
    tensors: list[TargetTensor],
    quantising: tuple[Quantiser | None, ImportanceMatrix | None],
    progress: Callable[[int, int], None] | None,
) -> RangeLoss:
    """Write the tensors' data; returns what that lost."""
    total, loss, done = sum(tensor.nbytes for tensor in tensors), RangeLoss(), 0
    quantiser, weights = quantising
    for tensor in tensors:
        begin, row = done, 0
        importance = None if weights is None or not tensor.quantised else weights.of(tensor.name, tensor.shape)
        for matrix in checkpoint.matrices(tensor.name):
            of_rows = None if importance is None else partial(tensor.of_rows, importance, row)
            for piece, piece_loss in pieces(matrix, tensor, quantiser, of_rows):
                file.write(piece.data)
                loss, done = loss + piece_loss, done + piece.nbytes
                if progress is not None:
                    progress(done, total)
            row += matrix.count
        assert done - begin == tensor.nbytes
        file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
    return loss


def _without_importance(weights: ImportanceMatrix, tensors: list[TargetTensor]) -> tuple[str, ...]:
    """A line about quantised tensors that have no entry; raises FileFormatError where one does not fit."""
    missing = weights.check({tensor.name: tensor.shape for tensor in tensors if tensor.quantised})
    missing = tuple(name for name in missing if name not in ("token_embd.weight", "output.weight"))  # as a rule
    if not missing:
        return ()
    return (f"the importance matrix has no entry for {len(missing)} tensors, {missing[0]} first: rounded without it",)


def _check_options(dtype: object, quantisation: object, imatrix: object, force: object) -> None:
    if imatrix is not None:
        path = path_of("the importance matrix", imatrix)
        if quantisation is None:
            raise RequestError(f"the importance matrix {quoted(str(path))} is for a quantised type; give --type, too")
    if dtype is not None and quantisation is not None:
        raise RequestError(f"dtype is {quoted(dtype)} and the quantised type {quoted(quantisation)}; give one of them")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in get_args(Dtype)):
        raise RequestError(f"dtype is {quoted(dtype)}; choose 'bf16' or 'f16'")
    if not isinstance(force, bool):
        raise RequestError(f"force is {quoted(force)}; give True or False")


def _open(source: Path, out: Path) -> Checkpoint | GgufSource:
    """Open a source; raise RequestError if the target is one of its files: `force` must not replace it."""
    if _is_gguf(source):
        opened: Checkpoint | GgufSource = GgufSource.open(source)
        split = _PART.fullmatch(source.name)
        files = [source, *(source.parent.glob(f"{glob.escape(split[1])}-*{split[2]}") if split else ())]
    else:
        folder = find_folder(source)
        opened = Checkpoint.open(folder)
        files = [path for path in folder.iterdir() if path.suffix != ".gguf"]
    if out.exists() and any(path.exists() and path.samefile(out) for path in files):
        raise RequestError(f"{out} belongs to the checkpoint that is converted; name another file")
    return opened


def _is_gguf(source: Path) -> bool:
    if source.suffix == ".gguf" or not source.is_file():
        return not source.is_dir() and source.suffix == ".gguf"
    with source.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _plan(checkpoint: Checkpoint | GgufSource, dtype: Dtype | Mixture | None, *, weighted: bool) -> list[TargetTensor]:
    """dtype: None for the source's; weights that are MXFP4 there then stay so. weighted: by an importance matrix."""
    config = checkpoint.config
    heads = {}
    if checkpoint.interleaves and config.architecture.rotary is Rotary.NEIGHBOURS and config.latent is None:
        heads = {Role.QUERY: config.head_count, Role.KEY: config.head_count_kv}
    tensors, plain = [], checkpoint.dtype
    for name, tensor in config.tensors(tied=checkpoint.tied).items():
        shape, kind = config.shape(tensor), str(plain)
        if tensor.role in FLOATS:
            kind = "f32"
        elif isinstance(dtype, Mixture):
            kind = tensor_type(dtype, name, shape, config, tied=checkpoint.tied, weighted=weighted)
        else:
            kind = dtype or ("mxfp4" if checkpoint.packed(name) else plain)
        tensors.append(TargetTensor(name, shape, kind, heads.get(tensor.role, 0)))
    return tensors


def _header(
    checkpoint: Checkpoint | GgufSource,
    dtype: Dtype | Mixture,
    tensors: list[TargetTensor],
    keys: Mapping[str, str | int],
) -> bytes:
    """Everything before the tensor data, padded to the alignment. keys: further ones, strings and uint32."""
    writer = gguf.GGUFWriter(None, checkpoint.config.architecture.gguf_name)
    packed = any(tensor.kind == "mxfp4" for tensor in tensors)
    packed_type = gguf.LlamaFileType.MOSTLY_MXFP4_MOE if packed else None
    writer.add_file_type(dtype.file_type if isinstance(dtype, Mixture) else packed_type or _FILE_TYPES[dtype])
    if isinstance(dtype, Mixture) or packed:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_custom_alignment(_ALIGNMENT)
    checkpoint.write_metadata(writer)
    for key, value in keys.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for tensor in tensors:
        unused = np.dtype(np.uint16)  # next to a raw_dtype, only uint8 has a meaning
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.nbytes, raw_dtype=tensor.type)
    # A pipe has no position, and a file without a name has no path: the writer gets an open file instead of a path.
    header = io.BytesIO()
    writer.fout, writer.state = [io.BufferedWriter(header)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = header.getvalue()
    return data.ljust(_padded(len(data)), b"\0")


def _check_opens(source: Path, header: bytes, nbytes: int) -> None:
    """Raise CheckpointError where our own reader would refuse the file: the source exceeds a limit."""
    try:
        check_header(header, nbytes)
    except FileFormatError as error:
        fault = str(error).removesuffix("; convert the model again")
        raise CheckpointError(f"{source}: the converted file could not be opened: {fault}") from None


def _padded(nbytes: int) -> int:
    """Bytes up to where the next tensor begins."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT

"""Conversion of a GGUF: float32 becomes 16 bits, experts of a tensor each are stacked, metadata stay as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from fiddler.converters.conversion import convert
from fiddler.errors import CheckpointError, FileFormatError, RequestError
from fiddler.files.inspection import describe
from oracles.command import FIDDLER
from oracles.synthetic import write_random_mixtral
from tools.old_mixtral import write_old_mixtral

OURS = {"general.file_type", "general.alignment"}


def rewritten(source: Path, target: Path, *, split=0, kinds=None, drop=(), more=()) -> Path:
    """`source` as the `gguf` package writes it: several files, other types, fewer tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama", split_max_tensors=split)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=element)
    for key, value, kind, element in more:
        writer.add_key_value(key, value, kind, sub_type=element)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        data, kind = tensor.data, tensor.tensor_type
        if kinds and "_exps" in tensor.name:
            kind = kinds
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, np.array(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, tuple[object, list[str]]]:
    fields = gguf.GGUFReader(path).fields.items()
    return {key: (field.contents(), [kind.name for kind in field.types]) for key, field in fields if key[:5] != "GGUF."}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_file_gets_the_bits_of_one_written_in_16_bits(tmp_path, dtype, tied):
    source = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32", tied=tied)
    expected = write_random_mixtral(tmp_path / "16.gguf", dtype=dtype, tied=tied)
    report = convert(source, tmp_path / "out.gguf", dtype)
    assert tensors(report.path) == tensors(expected)
    assert report.warnings[0].endswith(f" weights of the source have no exact value in {dtype}; they were rounded")
    theirs, ours = metadata(source), metadata(report.path)
    assert {key: ours[key] for key in theirs if key not in OURS} == {
        key: theirs[key] for key in theirs if key not in OURS
    }
    assert set(ours) - set(theirs) <= OURS
    assert ours["general.file_type"][0] == {"bf16": 32, "f16": 1}[dtype]
    assert describe(report.path)["runnable"] is True


@pytest.mark.parametrize("separate", [False, True])
def test_the_command_converts_a_gguf_without_importing_the_kernels(tmp_path, separate):
    source = write_random_mixtral(tmp_path / "stacked.gguf", dtype="bf16" if separate else "f32")
    if separate:
        source = write_old_mixtral(source, tmp_path / "separate.gguf", router=False)
    command = [sys.executable, "-X", "importtime", *FIDDLER[1:], "convert", source, tmp_path / "new.gguf"]
    done = subprocess.run(command, capture_output=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    assert {"gguf", "fiddler.converters.conversion", "fiddler.files.bus_error"} <= loaded
    assert not loaded & {"torch", "numba", "fiddler.kernels", "tokenizers"}


def test_metadata_of_every_type_stay_as_they_are(tmp_path):
    V = gguf.GGUFValueType
    more = [
        ("general.tags", ["a", "b"], V.ARRAY, V.STRING),
        ("x.int8", -3, V.INT8, None),
        ("x.uint64", 1 << 40, V.UINT64, None),
        ("x.float64", 0.1, V.FLOAT64, None),
        ("x.bools", [True, False], V.ARRAY, V.BOOL),
        ("x.int16s", [1, -2], V.ARRAY, V.INT16),
        ("x.text", "é", V.STRING, None),
    ]
    source = write_random_mixtral(tmp_path / "a.gguf", dtype="f32")
    source = rewritten(source, tmp_path / "more.gguf", more=more)
    convert(source, tmp_path / "out.gguf")
    theirs, ours = metadata(source), metadata(tmp_path / "out.gguf")
    assert all(ours[key] == theirs[key] for key in theirs if key not in OURS)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_experts_of_a_tensor_each_are_stacked_without_a_changed_bit(tmp_path, dtype):
    expected = write_random_mixtral(tmp_path / "stacked.gguf", dtype=dtype)
    source = write_old_mixtral(expected, tmp_path / "separate.gguf", router=False)
    report = convert(source, tmp_path / "out.gguf")
    assert tensors(report.path) == tensors(expected)
    assert (report.dtype, report.warnings) == (dtype, ())


def test_a_split_float32_file_becomes_one(tmp_path):
    source = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32")
    rewritten(source, tmp_path / "m.gguf", split=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    report = convert(parts[-1], tmp_path / "out.gguf")
    assert tensors(report.path) == tensors(write_random_mixtral(tmp_path / "bf16.gguf", dtype="bf16"))
    assert not any(key.startswith("split.") for key in metadata(report.path))
    with pytest.raises(RequestError, match="belongs to the checkpoint"):
        convert(parts[-1], parts[0], force=True)


@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_a_source_that_is_cut_short_meanwhile_is_one_error_and_nothing_is_left(tmp_path, left):
    """After the first piece of the target, and in another part of a split source."""
    source = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32")
    parts = [source, *sorted(rewritten(source, tmp_path / "m.gguf", split=7).parent.glob("m-*.gguf"))]
    before = set(tmp_path.iterdir())
    for opened, cut in ((source, source), (parts[1], parts[-1])):
        size = int(left * cut.stat().st_size)
        with pytest.raises(FileFormatError, match=f"{opened}: was cut short while in use; restore the file"):
            convert(opened, tmp_path / "out.gguf", progress=lambda *_, cut=cut, size=size: os.truncate(cut, size))
        assert set(tmp_path.iterdir()) == before


def test_a_source_that_is_replaced_meanwhile_is_converted_as_it_was(tmp_path):
    source, other = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32"), tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    report = convert(source, tmp_path / "out.gguf", progress=lambda *_: other.exists() and other.replace(source))
    assert tensors(report.path) == tensors(write_random_mixtral(tmp_path / "bf16.gguf", dtype="bf16"))


def test_a_gguf_is_known_by_its_first_bytes(tmp_path):
    source = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32").rename(tmp_path / "blob")
    assert convert(source, tmp_path / "out.gguf").dtype == "bf16"


def test_what_does_not_convert_is_refused_in_one_line(tmp_path):
    source = write_random_mixtral(tmp_path / "bf16.gguf", d=64, f=96)
    name = "blk.0.ffn_down_exps.weight"
    cases = {
        "is Q8_0, a quantised or unusual type": rewritten(
            source, tmp_path / "q8.gguf", kinds=gguf.GGMLQuantizationType.Q8_0
        ),
        f"tensor {name} is missing": rewritten(source, tmp_path / "missing.gguf", drop=[name]),
        "no such file": tmp_path / "nowhere.gguf",
    }
    for message, path in cases.items():
        with pytest.raises((CheckpointError, FileFormatError), match=message) as caught:
            convert(path, tmp_path / "out.gguf")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(RequestError, match="belongs to the checkpoint"):
        convert(source, source, force=True)

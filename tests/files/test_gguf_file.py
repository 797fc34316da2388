"""GGUF files open with the values, tensors and offsets that the `gguf` package reads; and the mapping is read-only."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from fiddler.errors import FileFormatError
from fiddler.files import gguf_header
from fiddler.files.gguf_file import GgufFile
from fiddler.files.gguf_header import Header, printable
from fiddler.files.model_file import ModelFile
from oracles.bad_files import written
from oracles.bad_gguf import Draft, Entry, array, mixtral, string, text

VALUES = {
    "UINT8": 255,
    "INT8": -128,
    "UINT16": 65535,
    "INT16": -32768,
    "UINT32": 2**32 - 1,
    "INT32": -(2**31),
    "UINT64": 2**64 - 1,
    "INT64": -(2**63),
    "FLOAT32": 0.1,
    "FLOAT64": 0.1,
    "BOOL": True,
    "STRING": "▁Füße\n\0😀",
}
LISTS = {
    "UINT8": [0, 255],
    "INT8": [-128, 127, 0],
    "UINT16": [65535],
    "INT16": [-32768, 1],
    "UINT32": [2**32 - 1, 0],
    "INT32": [-(2**31), 7],
    "UINT64": [2**64 - 1, 2**63],
    "INT64": [-(2**63), 1],
    "FLOAT32": [0.1, -0.0, math.inf],
    "FLOAT64": [0.1, 1e300],
    "BOOL": [True, False, True],
    "STRING": ["", "▁the", "<0x0A>", "\n", "😀" * 100],
}


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_agrees_with_the_gguf_reader(path: Path, file: GgufFile) -> None:
    reader = GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(file.metadata)
    for key, field in fields.items():
        ours, theirs = file.metadata[key], field.contents()
        if isinstance(ours, np.ndarray):
            assert ours.tolist() == theirs
        else:
            assert type(ours) is type(theirs)
            assert ours == theirs
    assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert info.name == tensor.name
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert info.type == tensor.tensor_type.name
        assert (info.nbytes, info.offset) == (tensor.n_bytes, tensor.data_offset)
        if info.type in ("F32", "F16", "BF16"):
            values = file.array(tensor.name)
            assert values.dtype == (np.float32 if info.type == "F32" else np.uint16)
            assert values.shape == info.shape
            assert values.tobytes() == tensor.data.tobytes()


def test_constants_equal_those_of_the_gguf_package():
    assert struct.unpack("<I", gguf_header.MAGIC) == (gguf.GGUF_MAGIC,)
    assert gguf.GGUF_VERSION in gguf_header.VERSIONS
    assert {*gguf_header.SCALARS, gguf_header.STRING, gguf_header.ARRAY} == {int(kind) for kind in GGUFValueType}
    assert (gguf_header.STRING, gguf_header.ARRAY) == (GGUFValueType.STRING, GGUFValueType.ARRAY)
    assert gguf_header.BOOL == GGUFValueType.BOOL
    for kind, (code, width) in gguf_header.SCALARS.items():
        theirs = "B" if kind == gguf_header.BOOL else GGUFWriter._simple_value_packing[GGUFValueType(kind)]
        assert code == f"<{theirs}"
        assert struct.calcsize(code) == np.dtype(code).itemsize == width
    for kind, (name, dtype) in gguf_header.VIEW_TYPES.items():
        assert GGMLQuantizationType(kind).name == name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (1, np.dtype(dtype).itemsize)


def test_metadata_of_every_value_type_is_read_as_by_the_gguf_package(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "any")
    for name, value in VALUES.items():
        writer.add_key_value(f"one.{name}", value, GGUFValueType[name])
    for name, values in LISTS.items():
        writer.add_key_value(f"many.{name}", values, GGUFValueType.ARRAY, GGUFValueType[name])
    finish(writer)
    file = GgufFile.open(tmp_path / "model.gguf")
    assert len(file.metadata) == 1 + len(VALUES) + len(LISTS)
    assert file.metadata["one.STRING"] == VALUES["STRING"]
    assert file.metadata["many.STRING"] == LISTS["STRING"]
    assert file.metadata["one.UINT64"] == 2**64 - 1
    assert_agrees_with_the_gguf_reader(tmp_path / "model.gguf", file)


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_f32_f16_and_bf16_tensors_can_be_viewed_at_every_alignment(tmp_path, alignment):
    random = np.random.default_rng(0)
    writer = GGUFWriter(tmp_path / "model.gguf", "any")
    writer.add_custom_alignment(alignment)
    for index, shape in enumerate([(1,), (3, 5), (2, 3, 4), (2, 1, 3, 7)]):
        writer.add_tensor(f"f32.{index}", random.standard_normal(shape).astype(np.float32))
        writer.add_tensor(f"f16.{index}", random.standard_normal(shape).astype(np.float16))
        bits = random.integers(0, 256, (*shape[:-1], 2 * shape[-1]), np.uint8)
        writer.add_tensor(f"bf16.{index}", bits, raw_dtype=GGMLQuantizationType.BF16)
    finish(writer)
    assert_agrees_with_the_gguf_reader(tmp_path / "model.gguf", GgufFile.open(tmp_path / "model.gguf"))


@pytest.mark.parametrize("kind", [kind for kind in GGML_QUANT_SIZES if kind not in gguf_header.VIEW_TYPES])
def test_tensors_of_other_types_have_the_right_size_and_no_view(tmp_path, kind):
    block, block_bytes = GGML_QUANT_SIZES[kind]
    writer = GGUFWriter(tmp_path / "model.gguf", "any")
    writer.add_tensor("weight", np.zeros((3, 2 * block_bytes), np.uint8), raw_dtype=kind)
    finish(writer)
    file = GgufFile.open(tmp_path / "model.gguf")
    assert file.tensors["weight"].shape == (3, 2 * block)
    assert_agrees_with_the_gguf_reader(tmp_path / "model.gguf", file)
    with pytest.raises(FileFormatError, match=f"tensor weight is {kind.name}"):
        file.array("weight")


def test_a_file_with_empty_arrays_and_no_tensors_opens(tmp_path):
    draft = Draft([("a", array(8, [])), ("b", array(5, [])), ("c", array(7, []))], [])
    file = GgufFile.open(written(tmp_path, draft.to_bytes()))
    assert file.metadata["a"] == []
    assert [file.metadata[key].tolist() for key in "bc"] == [[], []]
    assert file.tensors == {}


def test_viewing_an_unknown_tensor_is_an_error(tmp_path):
    file = GgufFile.open(written(tmp_path, mixtral().to_bytes()))
    with pytest.raises(FileFormatError, match=r"model\.gguf: has no tensor \\x1b\[0m"):
        file.array("\x1b[0m")


def test_a_gguf_of_version_2_opens(tmp_path):
    draft = mixtral()
    draft.version = struct.pack("<I", 2)
    assert ModelFile.open(written(tmp_path, draft.to_bytes())).file.version == 2


def resident_anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_views_are_read_only_and_lie_in_a_shared_mapping(tmp_path):
    size = 96 << 20
    draft = Draft([("general.architecture", text("any"))], [Entry("weight", [size // 2])])
    path = written(tmp_path, draft.to_bytes())
    file = GgufFile.open(path)
    before = resident_anonymous()
    values = file.array("weight")
    assert not values.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        values.flags.writeable = True
    assert np.shares_memory(values, file.array("weight"))
    total = int(values.sum(dtype=np.uint64))
    assert resident_anonymous() - before < size // 4
    assert total == int(np.arange(256, dtype=np.uint8).view(np.uint16).sum(dtype=np.uint64)) * (size // 256)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    assert [line[1] for line in maps] == ["r--s"]
    begin, end = (int(address, 16) for address in maps[0][0].split("-"))
    assert begin <= values.ctypes.data < values.ctypes.data + values.nbytes <= end
    assert file.nbytes == path.stat().st_size


def test_a_view_stays_valid_when_the_file_is_deleted(tmp_path):
    path = written(tmp_path, mixtral().to_bytes())
    values = GgufFile.open(path).array("output.weight")
    expected = values.copy()
    path.unlink()
    assert np.array_equal(values, expected)


def test_every_truncation_of_the_header_is_refused():
    draft = mixtral()
    content = draft.to_bytes()
    assert len(Header.parse(content).tensors) == 13
    for end in range(draft.ends["padding"] + 1):
        with pytest.raises(FileFormatError) as caught:
            Header.parse(content[:end])
        assert str(caught.value).isprintable()


def test_a_file_of_a_hundred_thousand_tensors_opens(tmp_path):
    count = 100_000
    rows = [string(f"t.{index}") + struct.pack("<IQIQ", 1, 8, 0, 32 * index) for index in range(count)]
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 0) + b"".join(rows)
    data = np.arange(8 * count, dtype=np.float32)
    file = GgufFile.open(written(tmp_path, head + bytes(-len(head) % 32) + data.tobytes()))
    assert len(file.tensors) == count
    assert file.array("t.99999").tolist() == data[-8:].tolist()


@pytest.mark.parametrize(
    "value", ["plain", "a\nb", "\x1b[0m", "\x9b", "\u202e", "\ud800", "x" * 10**6, [1] * 10**6, None]
)
def test_printable_returns_short_printable_text(value):
    shown = printable(value)
    assert shown.isprintable()
    assert len(shown) <= 60 + 3
    assert value != "plain" or shown == "plain"


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_opening_leaves_no_descriptors_open_but_the_mappings_and_one_to_read(tmp_path):
    before = descriptors()
    file = GgufFile.open(written(tmp_path, mixtral().to_bytes()))
    assert descriptors() <= before + 2  # `mmap` holds one
    assert isinstance(file._maps[0], mmap.mmap)
    del file
    assert descriptors() == before

"""Split models written by the `gguf` package: any part opens all; missing, swapped and foreign parts are refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from fiddler.errors import FileFormatError
from fiddler.files.gguf_file import GgufFile
from fiddler.files.model_file import ModelFile
from oracles.bad_files import written
from oracles.bad_gguf import Draft, Entry, u16, u32
from oracles.synthetic import write_random_mixtral


def split(folder: Path, **options: int | bool) -> tuple[GGUFReader, list[Path]]:
    """Write a model whole and again in parts; returns a reader of the whole file and the paths of the parts."""
    whole = GGUFReader(write_random_mixtral(folder / "whole.gguf"))
    writer = GGUFWriter(folder / "model.gguf", "llama", **options)
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole, sorted(folder.glob("model-*.gguf"))


@pytest.mark.parametrize(
    "options",
    [{"split_max_tensors": 10}, {"split_max_size": 70_000}, {"split_max_tensors": 30, "small_first_shard": True}],
)
def test_any_part_of_a_split_model_opens_all_parts(tmp_path, options):
    whole, parts = split(tmp_path, **options)
    assert len(parts) > 1
    for path in parts:
        model = ModelFile.open(path)
        model.check_runnable()
        file = model.file
        assert file.path == path
        assert file.nbytes == sum(part.stat().st_size for part in parts)
        assert [tensor.name for tensor in whole.tensors] == list(file.tensors)
        for tensor in whole.tensors:
            info = file.tensors[tensor.name]
            assert file.array(tensor.name).tobytes() == tensor.data.tobytes()
            raw = parts[info.part].read_bytes()[info.offset : info.offset + info.nbytes]
            assert raw == tensor.data.tobytes()


def test_a_split_model_behind_symbolic_links_opens_by_the_names_of_the_links(tmp_path):
    """As in a download cache: the names are links to files that are named by their hash."""
    _, parts = split(tmp_path, split_max_tensors=10)
    (tmp_path / "cache").mkdir()
    for index, path in enumerate(parts):
        path.rename(tmp_path / str(index))
        (tmp_path / "cache" / path.name).symlink_to(tmp_path / str(index))
    assert len(GgufFile.open(tmp_path / "cache" / parts[1].name).tensors) == 23


@pytest.mark.parametrize("removed, opened", list(itertools.permutations(range(3), 2)))
def test_a_missing_part_is_named(tmp_path, removed, opened):
    _, parts = split(tmp_path, split_max_tensors=10)
    parts[removed].unlink()
    with pytest.raises(FileFormatError, match=f"{parts[removed].name}: this part of 3 is missing"):
        GgufFile.open(parts[opened])


def test_swapped_parts_are_named(tmp_path):
    _, parts = split(tmp_path, split_max_tensors=10)
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    for path in parts:
        with pytest.raises(FileFormatError, match=f"{parts[1].name}: has split.no 2 and"):
            GgufFile.open(path)


def test_a_part_of_another_model_is_refused(tmp_path):
    _, parts = split(tmp_path, split_max_tensors=10)
    (tmp_path / "other").mkdir()
    _, other_parts = split(tmp_path / "other", split_max_tensors=9)
    shutil.copy(other_parts[1], parts[1])
    with pytest.raises(FileFormatError, match=r"appears twice|its parts hold"):
        GgufFile.open(parts[0])


def test_parts_with_fewer_tensors_than_the_first_part_says_are_refused(tmp_path):
    for number, names in enumerate(["a", "b"]):
        draft = Draft([], [Entry(name, [8]) for name in names])
        for key, value in {"no": u16(number), "count": u16(2), "tensors.count": u32(3)}.items():
            draft.set(f"split.{key}", value)
        written(tmp_path, draft.to_bytes(), f"m-{number + 1:05}-of-00002.gguf")
    with pytest.raises(FileFormatError, match="hold 2 tensors, the first says 3"):
        GgufFile.open(tmp_path / "m-00002-of-00002.gguf")

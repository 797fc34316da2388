"""PyTorch's .bin files that mean harm: torch's safe loader refuses them, and where it is too old, so do we any .bin."""

from __future__ import annotations

import pickletools
import struct
import zipfile

import pytest
import torch

from fiddler.converters.pytorch_file import PytorchFile, loads_safely
from fiddler.errors import CheckpointError

VERSIONS = {
    "2.6.0+cu124": False,
    "2.9.1": False,
    "2.10.0": True,
    "2.10.0a0+git1": True,
    "2.13.0+cpu": True,
    "3.0": True,
}


@pytest.fixture
def altered(tmp_path):
    """Writes a .bin of one tensor of 8 numbers, with another pickle in it."""

    def write(change):
        whole, path = tmp_path / "whole.bin", tmp_path / "altered.bin"
        torch.save({"a": torch.arange(8.0)}, whole)
        with zipfile.ZipFile(whole) as archive:
            records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        writer = torch._C.PyTorchFileWriter(str(path))
        for name, content in records.items():
            if name not in (".data/serialization_id", "version"):  # the writer's own
                content = change(content) if name == "data.pkl" else content
                writer.write_record(name, content, len(content))
        writer.write_end_of_file()
        return path

    return write


def larger(pickled):
    """The tensor and its storage have 2^26 numbers, by the pickle, and 8 in the archive."""
    places = [at for code, value, at in pickletools.genops(pickled) if code.name == "BININT1" and value == 8]
    assert len(places) == 2
    for at in reversed(places):
        pickled = pickled[:at] + b"J" + struct.pack("<i", 1 << 26) + pickled[at + 2 :]
    return pickled


def item_of_a_tensor(pickled):
    """SETITEM on the tensor in place of the dictionary."""
    end = pickled.rindex(b"s.")
    return pickled[:end] + b"K\x00G" + struct.pack(">d", 42.0) + b"s" + pickled[end:]


@pytest.mark.parametrize("change", [larger, item_of_a_tensor])
def test_a_file_that_leads_the_loader_out_of_its_tensors_is_refused_in_one_line(altered, change):
    with pytest.raises(CheckpointError) as caught:
        PytorchFile(altered(change))
    assert len(str(caught.value).splitlines()) == 1


def test_the_file_that_was_not_altered_loads_or_its_refusal_names_the_torch_that_would(altered):
    path = altered(lambda pickled: pickled)
    if loads_safely(torch.__version__):
        file = PytorchFile(path)
        assert file.rows(file.tensors["a"], 0, 1).tolist() == [list(range(8))]
    else:
        with pytest.raises(CheckpointError, match=r"CVE-2026-24747\); install torch 2\.10 or newer"):
            PytorchFile(path)


@pytest.mark.parametrize(("version", "safe"), VERSIONS.items())
def test_the_loader_is_safe_from_torch_2_10_on(version, safe):
    assert loads_safely(version) is safe

"""Quantised files that are damaged or strange: one line, or the right numbers, and never a crash."""

from __future__ import annotations

import shutil
import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch

import fiddler
from fiddler.errors import FileFormatError
from fiddler.files.model_file import ModelFile
from fiddler.kernels.formats import BLOCK_FORMATS
from oracles.command import fails_in_one_line, run
from oracles.quantised import write_quantised
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

GREEDY = fiddler.Sampling(temperature=0.0)
# where a block's float16 scale lies [bytes]; MXFP4 has one byte, a power of two
SCALES = dict.fromkeys(BLOCK_FORMATS, 0) | {"q2_k": 80, "q3_k": 108, "q6_k": 208}
VALUES = {"NaN": 0x7E00, "infinite": 0x7C00, "minus infinite": 0xFC00}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("source") / "bf16.gguf", d=256, f=512, layers=2, seed=4)


@pytest.fixture(scope="module")
def mixture(source, tmp_path_factory):
    """Every quantised type in one model, matrix by matrix: gate, up and down of one expert differ, too."""
    matrices = [each.name for each in gguf.GGUFReader(source).tensors if "norm" not in each.name]
    chosen = [each for each in matrices if "gate_inp" not in each]
    types = [*BLOCK_FORMATS] * 2
    of = dict(zip(chosen, types, strict=False))
    assert set(of.values()) == set(BLOCK_FORMATS)
    return write_quantised(source, tmp_path_factory.mktemp("mixture") / "all.gguf", of.get)


def tensor_of(path, kind):
    return next(each for each in gguf.GGUFReader(path).tensors if each.tensor_type.name == kind.upper())


def damaged(path, target, tensor, value):
    """A copy in which every block of a tensor has this scale."""
    kind = tensor.tensor_type.name.lower()
    shutil.copy(path, target)
    with target.open("r+b") as file:
        shape = tensor.n_bytes // BLOCK_FORMATS[kind].block_bytes, BLOCK_FORMATS[kind].block_bytes
        stored = np.memmap(file, np.uint8, "r+", tensor.data_offset, shape)
        if kind == "mxfp4":
            stored[:, 0] = 255
        else:
            stored[:, SCALES[kind] : SCALES[kind] + 2] = np.frombuffer(struct.pack("<H", value), np.uint8)
        stored.flush()
    return target


def test_a_file_of_every_type_at_once_computes_what_its_weights_are(mixture):
    ids = [1, *range(3, 300, 11)]
    logits = fiddler.load(mixture, precision="exact", device="cpu").logits(ids)
    with torch.inference_mode():
        expected = from_gguf(mixture)(torch.tensor([ids]), use_cache=False).logits[0]
    assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_scales_that_are_no_numbers_are_one_line(mixture, tmp_path, kind, precision):
    tensor = tensor_of(mixture, kind)
    for name, value in VALUES.items():
        path = damaged(mixture, tmp_path / f"{name}.gguf", tensor, value)
        engine = fiddler.load(path, device="cpu", precision=precision)
        if kind == "mxfp4":  # 2**127: a number, whose products need not be
            with suppress(FileFormatError):
                engine.generate("Once upon a time", GREEDY, max_tokens=4)
        else:
            with pytest.raises(FileFormatError, match="a weight is NaN or") as caught:
                engine.generate("Once upon a time", GREEDY, max_tokens=4)
            assert "\n" not in str(caught.value)
        path.unlink()


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_rows_of_no_whole_blocks_are_refused_by_the_header(mixture, tmp_path, kind):
    tensor = tensor_of(mixture, kind)
    name, width = tensor.name.encode(), int(tensor.shape[0])
    before = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)) + struct.pack("<Q", width)
    for columns in (width - 1, width + 16, 1, 0, 1 << 40):
        content = mixture.read_bytes()
        assert content.count(before) == 1
        path = tmp_path / f"{columns}.gguf"
        path.write_bytes(content.replace(before, before[:-8] + struct.pack("<Q", columns)))
        with pytest.raises(FileFormatError) as caught:
            ModelFile.open(path)
        assert "\n" not in str(caught.value)
        assert tensor.name in str(caught.value) or "shape" in str(caught.value)


def test_a_file_that_ends_within_a_block_is_refused(mixture, tmp_path):
    content, path = mixture.read_bytes(), tmp_path / "cut.gguf"
    end = max(each.data_offset + each.n_bytes for each in gguf.GGUFReader(mixture).tensors)
    for length in (end - 1, end - 17, end - 1000):
        path.write_bytes(content[:length])
        fails_in_one_line(run("run", path, "-p", "x", "--device", "cpu"), str(path))


def test_norms_and_routers_that_are_quantised_are_one_line_or_run(source, tmp_path):
    """No quantiser makes them."""
    for part in ("ffn_gate_inp", "attn_norm", "output_norm"):
        path = write_quantised(source, tmp_path / "q.gguf", lambda name, part=part: "q8_0" if part in name else None)
        process = run("run", path, "-p", "Once", "-n", 2, "--temp", 0, "--device", "cpu")
        if process.returncode:
            fails_in_one_line(process, part)

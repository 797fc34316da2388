"""`fiddler quantize`: types against those that llama-quantize chose, whole files against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import fiddler
from fiddler.converters import convert
from fiddler.converters.mixtures import ALIASES, MIXTURES, mixture_of, tensor_type
from fiddler.errors import FiddlerError
from fiddler.files.model_file import ModelFile
from oracles.command import fails_in_one_line, run
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

# the types in files that llama-quantize (commit 0c1e570) made of the two models of `SHAPES`, layer by layer
CHOSEN = json.loads((Path(__file__).parents[1] / "data" / "llama_quantize_types.json").read_text())
SHAPES = {
    "mix8": {"layers": 9, "d": 256, "f": 256, "experts": 8},
    "gqa4": {"layers": 8, "d": 256, "f": 512, "experts": 4, "heads": 8, "kv_heads": 2, "tied": True},
}
IDS = [1, *range(3, 500, 11)]


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    path = write_random_mixtral(tmp_path_factory.mktemp("model") / "bf16.gguf", **SHAPES[request.param])
    return request.param, ModelFile.open(path)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_each_tensor_has_the_type_that_llama_quantize_chooses(model, mixture):
    name, model_file = model
    config, expected = model_file.config, CHOSEN[name][mixture]
    for tensor_name, tensor in config.tensors(tied=model_file.tied).items():
        part = tensor_name.removesuffix(".weight")
        layer = 0
        if part.startswith("blk."):
            _, number, part = part.split(".", 2)
            layer = int(number)
        if part not in expected:
            assert "norm" in part or "gate_inp" in part
            continue
        types = expected[part].split()
        chosen = tensor_type(MIXTURES[mixture], tensor_name, config.shape(tensor), config, tied=model_file.tied)
        assert chosen.upper() == types[layer if len(types) > 1 else 0], (tensor_name, layer)


def test_rows_that_are_no_multiple_of_256_or_32_get_another_type(model):
    _, model_file = model
    for columns, kind in ((512, "q4_k"), (288, "q5_0"), (40, "f16")):
        chosen = tensor_type(MIXTURES["Q4_K_S"], "blk.1.attn_q.weight", (64, columns), model_file.config, tied=False)
        assert chosen == kind


def test_mixtures_have_names_aliases_and_numbers():
    assert {mixture_of(alias).name for alias in ALIASES} == {"Q3_K_M", "Q4_K_M", "Q5_K_M"}
    assert mixture_of("q4_k_m") is mixture_of("15") is MIXTURES["Q4_K_M"]
    for mixture in MIXTURES.values():
        assert gguf.LlamaFileType(mixture.file_type).name in (f"MOSTLY_{mixture.name}", "MOSTLY_MXFP4_MOE")
    for name in ("Q9_K", "", None, 15, "Q2_K_S"):
        with pytest.raises(FiddlerError, match="there are Q4_0"):
            mixture_of(name)


def test_a_quantised_file_runs_as_transformers_does_on_its_weights(tmp_path):
    source = write_random_mixtral(tmp_path / "bf16.gguf", d=256, f=512, seed=4)
    report = convert(source, tmp_path / "q.gguf", quantisation="q4_k")
    assert (report.dtype, report.nbytes) == ("Q4_K_M", report.path.stat().st_size)
    fields = gguf.GGUFReader(report.path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    logits = fiddler.load(report.path, precision="exact").logits(IDS)
    with torch.inference_mode():
        expected = from_gguf(report.path)(torch.tensor([IDS]), use_cache=False).logits[0]
    assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4
    with pytest.raises(FiddlerError, match="a quantised or unusual type"):
        convert(report.path, tmp_path / "again.gguf", quantisation="Q8_0")
    assert not (tmp_path / "again.gguf").exists()


def test_the_command_writes_a_file_or_says_one_line(tmp_path):
    source = write_random_mixtral(tmp_path / "bf16.gguf")
    done = run("quantize", source, tmp_path / "q8.gguf", "--type", "Q8_0")
    assert done.returncode == 0, done.stderr
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q8.gguf").tensors}
    assert types == {"Q8_0", "F32"}
    out = tmp_path / "x.gguf"
    fails_in_one_line(run("quantize", source, out, "--type", "Q9_9"), "type is 'Q9_9'; there are Q4_0")
    fails_in_one_line(run("convert", source, out, "--type", "Q8_0", "--dtype", "f16"), "give one of them")
    fails_in_one_line(run("quantize", source, tmp_path / "q8.gguf", "--type", "Q8_0"), "exists")
    assert not out.exists()


def test_weights_that_are_no_numbers_are_counted(tmp_path):
    source = write_random_mixtral(tmp_path / "f32.gguf", dtype="f32")
    reader = gguf.GGUFReader(source, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    tensor.data[3, 5] = np.nan
    reader.data.flush()
    report = convert(source, tmp_path / "q.gguf", quantisation="Q8_0")
    assert any("1 weights are NaN" in warning for warning in report.warnings)

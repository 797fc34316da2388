"""`--imatrix`: what an importance matrix does to a quantised file, and which files are refused."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from fiddler.converters import convert
from fiddler.converters.mixtures import MIXTURES, tensor_type
from fiddler.errors import FiddlerError
from fiddler.files.model_file import ModelFile
from oracles.command import fails_in_one_line, run
from oracles.quantised import values_of
from oracles.synthetic import write_random_mixtral
from tools.old_mixtral import write_old_mixtral

EXPERTS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_random_mixtral(folder / "bf16.gguf", d=256, f=512, experts=EXPERTS, layers=1, seed=4)


def entries_of(model):
    """Sums [E, K] and counts [E, 1] of every matrix but the router, by name."""
    random, entries = np.random.default_rng(5), {}
    for tensor in gguf.GGUFReader(model).tensors:
        if "blk." in tensor.name and "norm" not in tensor.name and "gate_inp" not in tensor.name:
            matrices = EXPERTS if "_exps" in tensor.name else 1
            sums = np.exp(2 * random.standard_normal((matrices, int(tensor.shape[0]))))
            entries[tensor.name] = [sums.astype(np.float32), np.full((matrices, 1), 7, np.float32)]
    return entries


def write_matrix(path, entries, *, kind="imatrix"):
    """As llama-imatrix writes it."""
    writer = gguf.GGUFWriter(path, "x")
    writer.kv_data[0].pop("general.architecture")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["some text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        if sums is not None:
            writer.add_tensor(f"{name}.in_sum2", sums)
        if counts is not None:
            writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def data(path):
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def weighted_errors(path, model, entries):
    """By tensor and expert: the squared error of each column times its sum of squared inputs."""
    exact = {tensor.name: values_of(tensor) for tensor in gguf.GGUFReader(model).tensors}
    errors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in entries:
            sums = entries[tensor.name][0]
            squares = (values_of(tensor) - exact[tensor.name]).reshape(len(sums), -1, sums.shape[1]) ** 2
            errors[tensor.name] = (squares * sums[:, None]).sum((1, 2))
    return errors


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "IQ4_NL"])
def test_each_expert_is_rounded_by_its_own_row_of_the_matrix(model, tmp_path, kind):
    entries = entries_of(model)
    matrix = write_matrix(tmp_path / "m.gguf", entries)
    report = convert(model, tmp_path / "weighted.gguf", quantisation=kind, imatrix=matrix)
    assert report.warnings == ()
    convert(model, tmp_path / "plain.gguf", quantisation=kind)
    swapped = {name: [sums[::-1], counts] for name, (sums, counts) in entries.items()}
    convert(model, tmp_path / "swapped.gguf", quantisation=kind, imatrix=write_matrix(tmp_path / "s.gguf", swapped))
    weighted, plain, other = (
        weighted_errors(tmp_path / f"{name}.gguf", model, entries) for name in ("weighted", "plain", "swapped")
    )
    assert set(weighted) == set(entries)
    for name, errors in weighted.items():
        assert (errors < 0.95 * plain[name]).all(), name
        if "_exps" in name:
            assert (errors < 0.95 * other[name]).all(), name


def test_experts_of_a_tensor_each_become_the_same_file(model, tmp_path):
    matrix = write_matrix(tmp_path / "m.gguf", entries_of(model))
    separate = write_old_mixtral(model, tmp_path / "separate.gguf", router=False)
    for source in (model, separate):
        convert(source, tmp_path / f"{source.stem}.q", quantisation="Q4_K_M", imatrix=matrix)
    assert data(tmp_path / "separate.q") == data(tmp_path / "bf16.q")


def test_an_expert_without_inputs_is_rounded_as_if_all_its_columns_were_alike(model, tmp_path):
    entries = entries_of(model)
    name = "blk.0.ffn_up_exps.weight"
    entries[name][1][2] = 0
    convert(model, tmp_path / "none.gguf", quantisation="Q6_K", imatrix=write_matrix(tmp_path / "a.gguf", entries))
    entries[name][1][2], entries[name][0][2] = 7, 0.125
    convert(model, tmp_path / "same.gguf", quantisation="Q6_K", imatrix=write_matrix(tmp_path / "b.gguf", entries))
    entries[name][0][2] = 0
    convert(model, tmp_path / "zero.gguf", quantisation="Q6_K", imatrix=write_matrix(tmp_path / "c.gguf", entries))
    assert data(tmp_path / "none.gguf") == data(tmp_path / "same.gguf") == data(tmp_path / "zero.gguf")


def test_the_file_says_by_which_matrix_it_was_made(model, tmp_path):
    matrix = write_matrix(tmp_path / "wiki.gguf", entries_of(model))
    convert(model, tmp_path / "q.gguf", quantisation="Q4_K_M", imatrix=matrix)
    fields = gguf.GGUFReader(tmp_path / "q.gguf").fields
    keys = {key.removeprefix("quantize.imatrix."): fields[key].contents() for key in fields if "imatrix" in key}
    assert keys == {"file": "wiki.gguf", "dataset": "some text.txt", "entries_count": 7, "chunks_count": 3}


def test_tensors_without_an_entry_are_rounded_without_and_one_line_says_so(model, tmp_path):
    entries = entries_of(model)
    lacks = [name for name in entries if "attn_" in name]
    for name in lacks:
        del entries[name]
    report = convert(
        model, tmp_path / "q.gguf", quantisation="Q4_K_M", imatrix=write_matrix(tmp_path / "m.gguf", entries)
    )
    convert(model, tmp_path / "plain.gguf", quantisation="Q4_K_M")
    assert len(report.warnings) == 1
    assert "no entry for 4 tensors, blk.0.attn_q.weight first" in report.warnings[0]
    actual, plain = data(tmp_path / "q.gguf"), data(tmp_path / "plain.gguf")
    for name in actual:
        assert (actual[name] == plain[name]) == (name not in entries), name


def test_an_embedding_of_another_size_is_left_out_as_llama_quantize_does(model, tmp_path):
    entries = {**entries_of(model), "token_embd.weight": [np.ones((1, 32), np.float32), np.ones((1, 1), np.float32)]}
    report = convert(model, tmp_path / "q", quantisation="Q4_0", imatrix=write_matrix(tmp_path / "m.gguf", entries))
    assert report.warnings == ()


def test_types_that_a_matrix_changes_are_those_of_llama_quantize(tmp_path):
    """In the first eighth of the layers: `llama_tensor_get_type_impl` (commit 0c1e570)."""
    file = ModelFile.open(write_random_mixtral(tmp_path / "m.gguf", layers=8, d=256, f=256))
    for kind, first, second in (
        ("Q4_0", "q4_1", "q4_0"),
        ("Q5_0", "q5_1", "q5_0"),
        ("IQ4_XS", "iq4_xs", "iq4_xs"),
        ("Q4_K_S", "q5_k", "q4_k"),
        ("Q8_0", "q8_0", "q8_0"),
    ):
        for layer, expected in ((0, first), (1, second)):
            name = f"blk.{layer}.ffn_down_exps.weight"
            chosen = tensor_type(MIXTURES[kind], name, (4, 256, 256), file.config, tied=False, weighted=True)
            assert chosen == expected, (kind, layer)


NAME = "blk.0.ffn_down_exps.weight"


def changed(entries, part, index, value):
    entries[NAME][part] = entries[NAME][part].copy()
    entries[NAME][part][index] = value


BAD = {
    "NaN": (lambda e: changed(e, 0, (1, 3), np.nan), "has the value nan"),
    "infinite": (lambda e: changed(e, 0, (1, 3), np.inf), "has the value inf"),
    "negative": (lambda e: changed(e, 0, (1, 3), -1), "has the value -1.0"),
    "count is NaN": (lambda e: changed(e, 1, (1, 0), np.nan), "has the value nan"),
    "fewer experts": (lambda e: e.update({NAME: [part[:3] for part in e[NAME]]}), "1536 sums and 3 counts"),
    "fewer columns": (lambda e: e.update({NAME: [e[NAME][0][:, :-1], e[NAME][1]]}), "4 x 512 columns"),
    "no counts": (lambda e: e[NAME].__setitem__(1, None), "without its counts"),
    "no sums": (lambda e: e[NAME].__setitem__(0, None), "without its in_sum2"),
    "float16": (lambda e: e[NAME].__setitem__(0, e[NAME][0].astype(np.float16)), "is F16, not F32"),
    "nothing": (lambda e: e.clear() or e.update(x=[None, None]), "is no importance matrix"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_matrix_that_cannot_be_used_is_one_line_and_nothing_is_written(model, tmp_path, fault):
    change, line = BAD[fault]
    entries = entries_of(model)
    change(entries)
    matrix = write_matrix(tmp_path / "m.gguf", entries)
    with pytest.raises(FiddlerError, match=line) as caught:
        convert(model, tmp_path / "q.gguf", quantisation="Q4_K_M", imatrix=matrix)
    assert str(matrix) in str(caught.value)
    assert not (tmp_path / "q.gguf").exists()


def test_the_command_takes_a_matrix_or_says_one_line(model, tmp_path):
    matrix = write_matrix(tmp_path / "m.gguf", entries_of(model))
    done = run("quantize", model, tmp_path / "q.gguf", "--type", "Q4_K_M", "--imatrix", matrix)
    assert done.returncode == 0, done.stderr
    done = run("convert", model, tmp_path / "c.gguf", "--type", "Q4_K_M", "--imatrix", matrix)
    assert done.returncode == 0, done.stderr
    assert data(tmp_path / "c.gguf") == data(tmp_path / "q.gguf")
    out = tmp_path / "x.gguf"
    old = tmp_path / "old.dat"
    name = b"blk.0.attn_q.weight"
    old.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii256f", 1, 256, *[1.0] * 256))
    quantize = "quantize", model, out, "--type", "Q4_K_M", "--imatrix"
    fails_in_one_line(run(*quantize, old), "old form; convert it with llama-imatrix --in-file")
    fails_in_one_line(run(*quantize, model), "is no importance matrix")
    fails_in_one_line(run(*quantize, tmp_path / "none"), "no such file")
    fails_in_one_line(run(*quantize, tmp_path), "is a folder")
    fails_in_one_line(run("convert", model, out, "--imatrix", matrix), "give --type, too")
    assert not out.exists()

"""What `convert` writes, the reader opens: a source beyond the reader's limits is refused before any writing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from fiddler.converters import convert
from fiddler.errors import CheckpointError, FileFormatError
from fiddler.files.gguf_header import Header
from fiddler.files.model_file import ModelFile, check_header
from fiddler.text.sentencepiece_model import SentencePieceModel

TINY = Path(__file__).parents[1] / "data" / "tiny"
AT = 400  # an ordinary token of the tiny tokenizer
Change = Callable[[Path], object]


def keys(file: str, **values: object) -> Change:
    """Set keys of a JSON file; the chat template is then that of `tokenizer_config.json`."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    return change


def piece(text: str, score: float = 0.0) -> Change:
    """Another token of the SentencePiece model."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.model"
        model = SentencePieceModel.from_bytes(path.read_bytes())
        pieces = (*model.pieces[:AT], text.encode(), *model.pieces[AT + 1 :])
        scores = (*model.scores[:AT], score, *model.scores[AT + 1 :])
        path.write_bytes(dataclasses.replace(model, pieces=pieces, scores=scores).to_bytes())

    return change


def theta(value: object) -> Change:
    return keys("config.json", rope_parameters={"rope_theta": value, "rope_type": "default"})


def epsilon(value: object) -> Change:
    return keys("config.json", rms_norm_eps=value)


def templates(count: int) -> Change:
    entries = [{"name": f"n{index}", "template": "x"} for index in range(count)]
    return keys("tokenizer_config.json", chat_template=entries)


def large_vocabulary(folder: Path) -> None:
    """A vocabulary of 2^20 + 1 tokens, with a width of 2 and matrices to match."""
    tensors = load((folder / "model.safetensors").read_bytes())
    for name, tensor in tensors.items():
        vocab = name in ("model.embed_tokens.weight", "lm_head.weight")
        shape = [2**20 + 1 if vocab else tensor.shape[0], *(2 for _ in tensor.shape[1:])]
        if name.endswith("norm.weight"):
            shape = [2]
        elif name.endswith(("w2.weight", "o_proj.weight")):
            shape = [2, tensor.shape[1]]
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    keys("config.json", vocab_size=2**20 + 1, hidden_size=2, head_dim=16)(folder)


REFUSED: dict[str, tuple[Change, str]] = {
    "a base that float32 flushes to 0": (theta(1e-46), "rope_theta is 1e-46"),
    "a base that is infinite in float32": (theta(3.41e38), "rope_theta is 3.41e+38"),
    "an epsilon that float32 rounds to 1": (epsilon(0.99999999999), "layer_norm_rms_epsilon is 1.0"),
    "an epsilon that float32 flushes to 0": (epsilon(1e-46), "rms_norm_eps is 1e-46"),
    "a token of 65,537 characters": (piece("a" * 65_537), "token 400 is 65537 characters long; at most 65536"),
    "a token of 70,000 characters": (piece("a" * 70_000), "token 400 is 70000 characters long"),
    "a token that the library refuses": (piece("a" * 65_536), "piece is too long"),
    "a vocabulary of more than 2^20": (large_vocabulary, "vocab_size in config.json is 1048577; at most 1048576"),
    "more metadata than the reader takes": (templates(70_000), "metadata pairs, far more than any model needs"),
    "a template with half a character": (keys("tokenizer_config.json", chat_template="\ud800"), r"holds '\\ud800'"),
}
OPENS: dict[str, Change] = {
    "the smallest base of float32": theta(1.4e-45),
    "the largest base": theta(3.4e38),
    "an epsilon of 0": epsilon(0),
    "a score at the end of float32": piece("zzzz", -3.4e38),
    "a token of 4,000 characters": piece("a" * 4000),
    "a token of control characters": piece("z\x1b[31m\n"),
    "a context of 2^24": keys("config.json", max_position_embeddings=2**24),
    "a window beyond the context": keys("config.json", sliding_window=2**31 - 1),
    "a template with a NUL": keys("tokenizer_config.json", chat_template="a\0b"),
    "names of templates that become one": keys(
        "tokenizer_config.json", chat_template=[{"name": name, "template": name} for name in ("a b", "a_b")]
    ),
    "a name of a template without a letter": keys(
        "tokenizer_config.json", chat_template=[{"name": "\ud800", "template": "x"}]
    ),
}


def changed(change: Change, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "hf"))
    change(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reader_would_refuse_is_refused_in_one_line_and_nothing_is_written(name, tmp_path):
    change, says = REFUSED[name]
    folder = changed(change, tmp_path)
    with pytest.raises(CheckpointError, match=says.replace("+", r"\+")) as caught:
        convert(folder, tmp_path / "out.gguf")
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", OPENS)
def test_what_is_written_at_the_limit_opens(name, tmp_path):
    convert(changed(OPENS[name], tmp_path), tmp_path / "out.gguf")
    model = ModelFile.open(tmp_path / "out.gguf")
    model.check_runnable()
    assert model.tokenizer.vocab_size == 512


@pytest.mark.parametrize("name", [os.fsdecode(b"hf\xff\xfe"), "x\x1b[31mRED\nline", "n" * 250])
def test_a_folder_of_any_name_converts(name, tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / name))
    convert(folder, tmp_path / "out.gguf")
    written = ModelFile.open(tmp_path / "out.gguf").file.metadata["general.name"]
    assert written == os.fsencode(name).decode("utf-8", "replace")


def header_of(path: Path) -> tuple[bytes, int]:
    """A file's bytes before its tensor data, and its size."""
    data = path.read_bytes()
    return data[: min(tensor.offset for tensor in Header.parse(data).tensors)], len(data)


def test_a_header_alone_is_checked_as_the_whole_file_is(tmp_path):
    """The reader and the check before writing read the same bytes, so they cannot differ."""
    convert(TINY, tmp_path / "out.gguf")
    header, nbytes = header_of(tmp_path / "out.gguf")
    check_header(header, nbytes)
    with pytest.raises(FileFormatError, match="truncated"):
        check_header(header, nbytes - 64)
    damaged = header.replace(np.float32(1e6).tobytes(), np.float32(0).tobytes(), 1)
    assert damaged != header
    with pytest.raises(FileFormatError, match=r"rope.freq_base is 0\.0"):
        check_header(damaged, nbytes)
    assert gguf.GGUF_MAGIC.to_bytes(4, "little") == header[:4]


def test_a_weight_that_is_nan_is_called_so(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "hf"))
    tensors = load((folder / "model.safetensors").read_bytes())
    tensors["model.norm.weight"][3] = float("nan")
    tensors["lm_head.weight"][5, 7:9] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("bf16", "f16"):
        report = convert(folder, tmp_path / f"{dtype}.gguf", dtype)
        assert [line for line in report.warnings if "NaN" in line] == [
            "3 weights are NaN, as in the checkpoint: the model will not run; download it again"
        ]
        assert report.overflowed == 0

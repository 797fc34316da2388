"""`fiddler inspect` against the `gguf` package; and that text in a file cannot steer a terminal."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader

from fiddler.files.inspection import describe, size_text, to_text
from oracles.bad_files import written
from oracles.bad_gguf import array, f32, ints, mixtral, text, texts, u32
from oracles.synthetic import write_random_mixtral


def inspect(*arguments: str | Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "fiddler", "inspect", *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("tied", [False, True])
def test_json_agrees_with_the_gguf_package(tmp_path, tied):
    path = write_random_mixtral(tmp_path / "model.gguf", layers=3, tied=tied, window=100)
    output = json.loads(inspect(path, "--json"), parse_constant=refuse)
    tensors = GGUFReader(path).tensors
    assert output["architecture"] == {
        "name": "llama",
        "parameters": sum(int(tensor.n_elements) for tensor in tensors),
        "layers": 3,
        "width": 64,
        "expert_width": 96,
        "experts": 4,
        "experts_per_token": 2,
        "one_tensor_an_expert": False,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "context": 1024,
        "sliding_window": 100,
        "rope_freq_base": 1e6,
        "rms_epsilon": pytest.approx(1e-5),
        "tied_embeddings": tied,
        "dense_layers": 0,
        "dense_width": 0,
        "shared_expert_width": 0,
        "parts": {
            "norm": "rms",
            "qk_norm": "none",
            "attention_bias": "none",
            "sinks": "none",
            "window": "every layer",
            "rotary": "neighbours",
            "router": "softmax, top 2, renormalised",
            "activation": "silu",
            "expert_bias": "none",
            "shared_experts": "none",
            "dense_layers": "none",
        },
    }
    sizes = output["bytes"]
    expert = 3 * 64 * 96 * 2
    assert sizes["file"] == path.stat().st_size
    assert sizes["weights"] == sum(int(tensor.n_bytes) for tensor in tensors) == sizes["experts"] + sizes["dense"]
    assert sizes["one_expert"] == expert
    assert sizes["experts"] == 3 * 4 * expert
    assert sizes["experts_read_per_token"] == 3 * 2 * expert
    assert output["types"] == {"BF16": len(tensors) - 10, "F32": 10}
    assert output["tokenizer"] == {
        "model": "llama",
        "vocabulary": 512,
        "bos": 1,
        "eos": 2,
        "add_bos": True,
        "chat_template": False,
    }
    assert [(t["name"], t["type"], t["bytes"], t["offset"]) for t in output["tensors"]] == [
        (tensor.name, tensor.tensor_type.name, tensor.n_bytes, tensor.data_offset) for tensor in tensors
    ]
    assert output["metadata"]["tokenizer.ggml.tokens"] == "[512 strings]"
    assert output["metadata"]["tokenizer.ggml.scores"] == "[512 x float32]"


def test_text_shows_sizes_and_every_tensor(tmp_path):
    path = write_random_mixtral(tmp_path / "model.gguf")
    shown = inspect(path)
    assert "2 layers of width 64, 4 experts of width 96, 2 a token" in shown
    assert "tokenizer llama, 512 tokens, BOS 1, EOS 2, chat template: no" in shown
    for tensor in GGUFReader(path).tensors:
        assert f"  {tensor.name} " in shown


def test_control_characters_in_a_file_cannot_steer_a_terminal(tmp_path):
    draft = mixtral()
    draft.set("general.name", text("\x1b]0;title\x07\x1b[2J\r\u202eevil\x9b1m\n"))
    path = written(tmp_path, draft.to_bytes(), "\x1b[31m.gguf")
    as_text = inspect(path)
    assert all(line.isprintable() for line in as_text.split("\n"))
    assert r"\x1b]0;title\x07\x1b[2J\r\u202eevil\x9b1m\n: " in as_text
    as_json = inspect(path, "--json")
    assert as_json.isascii()
    assert all(line.isprintable() for line in as_json.split("\n"))
    assert json.loads(as_json)["name"] == "\x1b]0;title\x07\x1b[2J\r\u202eevil\x9b1m\n"


def test_nan_infinite_long_and_array_values_are_described_in_valid_json(tmp_path):
    draft = mixtral()
    draft.set("general.name", array(5, []))
    draft.set("general.nan", f32(math.nan))
    draft.set("general.infinite", f32(-math.inf))
    draft.set("general.long", text("é" * 10**6))
    draft.set("general.tags", texts(["a"]))
    draft.set("general.ids", ints([1, 2]))
    description = describe(written(tmp_path, draft.to_bytes()))
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["name"] == "[0 x int32]"
    metadata = description["metadata"]
    assert [metadata[f"general.{key}"] for key in ("nan", "infinite", "tags", "ids")] == [
        "nan",
        "-inf",
        "[1 strings]",
        "[2 x int32]",
    ]
    assert len(metadata["general.long"]) < 210
    assert to_text(description).startswith("[0 x int32]: ")


@pytest.mark.parametrize("kind", ["linear", "yarn", "none"])
def test_a_rope_scaling_of_factor_1_runs(tmp_path, kind):
    draft = mixtral()
    draft.set("llama.rope.scaling.type", text(kind))
    draft.set("llama.rope.scaling.factor", f32(1.0))
    assert describe(written(tmp_path, draft.to_bytes()))["runnable"] is True


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("general.architecture", text("gemma4"), "general.architecture is 'gemma4'"),
        ("llama.expert_count", u32(0), "a Llama or Mistral has no experts"),
        ("tokenizer.ggml.model", text("bert"), "tokenizer.ggml.model is 'bert'"),
        ("llama.rope.scaling.factor", f32(-2.0), "rope.scaling.factor is -2.0"),
    ],
)
def test_a_file_that_does_not_run_is_described_with_the_reason(tmp_path, key, value, reason):
    draft = mixtral()
    draft.set(key, value)
    path = written(tmp_path, draft.to_bytes())
    output = json.loads(inspect(path, "--json"))
    assert reason in output["runnable"]
    assert "\n" not in output["runnable"]
    assert str(tmp_path) not in output["runnable"]
    assert {tensor["name"]: tensor["type"] for tensor in output["tensors"]}["blk.0.ffn_gate_exps.weight"] == "BF16"
    assert f"does not run: {output['runnable']}" in to_text(describe(path))


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(93_405_000_000, "93.41 GB"), (100_000_000, "0.10 GB"), (99_000_000, "99.00 MB"), (6_980_000, "6.98 MB"),
     (1024, "1.02 kB"), (0, "0.00 kB")],
)  # fmt: skip
def test_sizes_are_told_in_a_unit_that_shows_them(nbytes, expected):
    assert size_text(nbytes) == expected

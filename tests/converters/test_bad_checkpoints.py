"""Bad checkpoint folders: each gives one line that names the fault, from Python and from the command line."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from fiddler.converters import convert
from fiddler.errors import CheckpointError

TINY = Path(__file__).parents[1] / "data" / "tiny"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, LAYER = "model.norm.weight", "model.layers.0"
Damage = Callable[[Path], object]


def config(**values: object) -> Damage:
    """Set keys of config.json; `...` removes one."""

    def damage(folder: Path) -> None:
        changed = json.loads((folder / "config.json").read_text()) | values
        text = json.dumps({key: value for key, value in changed.items() if value is not ...})
        (folder / "config.json").write_text(text)

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors as a dictionary; safetensors itself writes the file."""

    def damage(folder: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def header(change: Callable[[dict[str, dict]], object]) -> Damage:
    """Change the header only: safetensors itself would never write such a file."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return damage


def raw(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def shards(change: Callable[[Path, dict[str, str]], object]) -> Damage:
    """Two shards and an index, then `change(folder, weight_map)`."""

    def damage(folder: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        weight_map = {}
        for number, part in ((1, names[:20]), (2, names[20:])):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def only_bin(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model-00001-of-00002.bin")


def entry(**values: object) -> Damage:
    return header(lambda entries: entries[NORM].update(values))


def copy_into_first(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    save_file(load(path.read_bytes()) | {NORM: torch.ones(64)}, path)


def move_back(entries: dict[str, dict]) -> None:
    begin, end = entries[NORM]["data_offsets"]
    entries[NORM]["data_offsets"] = [begin - 2, end - 2]


BAD: dict[str, tuple[Damage, str]] = {
    # config.json
    "no config": (without("config.json"), "config.json is missing"),
    "config not JSON": (raw("config.json", lambda text: text[:-5]), "config.json is not JSON"),
    "config of bytes": (raw("config.json", lambda text: b"\xff\xfe" + text), "config.json is not JSON"),
    "config nested": (raw("config.json", lambda text: b"[" * 100_000), "nested too deeply"),
    "config an array": (raw("config.json", lambda text: b"[1]"), "holds [1]; it must be a JSON object"),
    "config of digits": (raw("config.json", lambda text: b'{"a": ' + b"9" * 5000 + b"}"), "is not JSON"),
    "key twice": (raw("config.json", lambda text: b'{"a": 1, "a": 2}'), "the key 'a' appears twice"),
    "another architecture": (config(model_type="jetmoe"), "model_type is 'jetmoe'; only 'mixtral', 'qwen3_moe'"),
    "no architecture": (config(model_type=...), "model_type is None"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config: 'gptq'",
    ),
    "gelu": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "longrope": (config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e6}), "rope_type is 'longrope'"),
    "linear beside another": (config(rope_scaling={"type": "linear", "factor": 2.0}), "and rope_scaling differ"),
    "factor": (config(rope_scaling={"factor": 4.0}), "RoPE's factor is 4.0"),
    "RoPE by layer": (config(rope_parameters={"sliding": {"rope_theta": 1e4}}), "one RoPE for all layers"),
    "two thetas": (config(rope_theta=10000.0), "rope_theta has the values [10000.0, 1000000.0]"),
    "half a head": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "no width": (config(hidden_size=...), "[512, 64], but config.json implies [512, 4096]"),
    "width null": (config(hidden_size=None), "hidden_size is null"),
    "width a word": (config(hidden_size="big"), "hidden_size is 'big'; it must be an integer"),
    "width a truth": (config(hidden_size=True), "hidden_size is True"),
    "no layers": (config(num_hidden_layers=0), "block_count is 0"),
    "millions of layers": (
        config(num_hidden_layers=1 << 24),
        "num_hidden_layers 16777216, but there are only 41",
    ),
    "heads do not divide": (config(num_attention_heads=7), "hidden_size 64 over num_attention_heads 7"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads 0"),
    "KV heads do not divide": (config(num_key_value_heads=3), "head_count_kv 3"),
    "too many used": (config(num_experts_per_tok=5), "expert_used_count is 5, but there are only 4"),
    "epsilon": (config(rms_norm_eps=2.0), "layer_norm_rms_epsilon is 2.0"),
    "theta out of range": (config(rope_parameters={"rope_theta": 10**400}), "rope_theta is a number of 1329 bits"),
    "theta no number": (
        raw("config.json", lambda text: text.replace(b"1000000.0", b"NaN")),
        "rope_theta is nan",
    ),
    "window": (config(sliding_window=0), "sliding_window is 0"),
    "tied a word": (config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    "biases said": (config(attention_bias=True), "attention_bias is True"),
    # The files of the folder
    "no weights": (without(WEIGHTS), f"has neither {WEIGHTS} nor {INDEX}"),
    "a shard without its index": (only_bin, "pytorch_model.bin.index.json is missing"),
    "no tokenizer": (without("tokenizer.model"), "tokenizer"),
    "a shard is missing": (
        shards(lambda folder, _: (folder / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors is missing",
    ),
    "the index reaches out": (
        shards(lambda _, names: names.update({NORM: "../model.safetensors"})),
        "'../model.safetensors' is not the name of a safetensors file",
    ),
    "the index is wrong": (
        shards(lambda _, names: names.update({NORM: "model-00001-of-00002.safetensors"})),
        f"tensor '{NORM}' is in model-00001-of-00002.safetensors; it is not there",
    ),
    "the index is empty": (shards(lambda _, names: names.clear()), "weight_map is {}"),
    "the same tensor in two shards": (
        shards(lambda folder, _: copy_into_first(folder)),
        f"'{NORM}' is in both",
    ),
    # The container
    "an LFS pointer": (
        raw(WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "empty": (raw(WEIGHTS, lambda _: b""), "is 0 bytes long"),
    "not safetensors": (
        raw(WEIGHTS, lambda data: b"\xff" * 100),
        "header of 18446744073709551615 bytes in a file",
    ),
    "truncated": (raw(WEIGHTS, lambda data: data[:-1]), "481407 bytes long, but its header describes 481408"),
    "trailing bytes": (
        raw(WEIGHTS, lambda data: data + b"\0"),
        "481409 bytes long, but its header describes",
    ),
    "header cut": (raw(WEIGHTS, lambda data: data[:200]), "in a file of 200"),
    "header garbled": (
        raw(WEIGHTS, lambda data: data[:8] + b"!" + data[9:]),
        f"header of {{folder}}/{WEIGHTS} is not",
    ),
    "header not an entry": (
        header(lambda entries: entries.update({NORM: 5})),
        f"'{NORM}' has the header entry 5",
    ),
    "shape too small": (entry(shape=[63]), "of shape [63] and dtype BF16 cannot have 128 bytes"),
    "shape overflows": (entry(shape=[1 << 61, 1 << 61]), "cannot have 128 bytes"),
    "shape negative": (entry(shape=[-64]), "has shape [-64]"),
    "shape a number": (entry(shape=64), "has shape 64 at"),
    "shape a fraction": (entry(shape=[64.0]), "has shape [64.0]"),
    "offsets overlap": (header(move_back), "overlaps"),
    "a gap": (header(lambda entries: entries.pop(f"{LAYER}.self_attn.k_proj.weight")), "leaves a gap"),
    "offsets missing": (header(lambda entries: entries[NORM].pop("data_offsets")), "has the header entry"),
    "offsets backwards": (entry(data_offsets=[128, 0]), "cannot have -128 bytes"),
    "offsets out of the file": (entry(data_offsets=[1 << 40, (1 << 40) + 128]), "leaves a gap"),
    "unknown dtype": (entry(dtype="F4"), "unknown dtype 'F4'"),
    # The tensors
    "integers": (weights(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM} is I8, a quantised"),
    "doubles": (
        weights(lambda t: t.update({NORM: t[NORM].double()})),
        f"{NORM} is F64, a quantised or unusual",
    ),
    "a norm is missing": (weights(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "an expert is missing": (
        weights(lambda t: t.pop(f"{LAYER}.block_sparse_moe.experts.3.w2.weight")),
        f"{LAYER}.block_sparse_moe.experts.3.w2.weight is missing",
    ),
    "the output is missing": (weights(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "a bias": (
        weights(lambda t: t.update({f"{LAYER}.self_attn.q_proj.bias": torch.ones(64)})),
        f"'{LAYER}.self_attn.q_proj.bias' is not part of a Mixtral",
    ),
    "a name of two lines": (
        weights(lambda t: t.update({"two\nlines": torch.ones(1)})),
        r"'two\nlines' is not part",
    ),
    "one layer more": (
        config(num_hidden_layers=1),
        "'model.layers.1.block_sparse_moe.experts.0.w1.weight' is not part",
    ),
    "one layer less": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "another width": (config(intermediate_size=128), "has shape [96, 64], but config.json implies [128, 64]"),
    "another number of experts": (
        config(num_local_experts=8),
        "has shape [4, 64], but config.json implies [8, 64]",
    ),
    "a scalar": (
        weights(lambda t: t.update({NORM: torch.tensor(1.0)})),
        f"{NORM} has shape [], but config.json implies [64]",
    ),
    "transposed": (
        weights(lambda t: t.update({f"{LAYER}.self_attn.k_proj.weight": torch.ones(64, 32)})),
        "k_proj.weight has shape [64, 32], but config.json implies [32, 64]",
    ),
}


# A process each: some faults of every stage, not all.
BY_COMMAND = [
    "no config", "config nested", "quantised", "width a word", "millions of layers", "no tokenizer",
    "a shard without its index",
    "a shard is missing", "the index reaches out", "an LFS pointer", "truncated", "shape overflows", "integers",
    "an expert is missing", "a name of two lines",
]  # fmt: skip


def damaged(fault: str, tmp_path: Path) -> tuple[Path, str]:
    folder = Path(shutil.copytree(TINY, tmp_path / "hf"))
    damage, message = BAD[fault]
    damage(folder)
    return folder, re.escape(message.replace("{folder}", str(folder)))


@pytest.mark.parametrize("fault", BAD)
def test_convert_raises_one_line_that_names_the_fault_and_writes_nothing(fault, tmp_path):
    folder, message = damaged(fault, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "out.gguf")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("fault", BY_COMMAND)
def test_the_command_line_names_the_fault_in_one_line_within_two_seconds(fault, tmp_path):
    folder, message = damaged(fault, tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fiddler", "convert", folder, tmp_path / "out.gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2  # of processor time [s]
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)


@pytest.mark.parametrize("name, message", [("nowhere", "does not exist"), ("file", "is a file")])
def test_a_source_that_is_no_folder_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name} {message}; give the folder"):
        convert(tmp_path / name, tmp_path / "out.gguf")

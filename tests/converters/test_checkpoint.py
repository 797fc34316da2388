"""A checkpoint folder as a lazy source: the forms of config.json, both expert layouts, tied embeddings, views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load, save_file
from transformers import MixtralConfig

from fiddler.converters.checkpoint import Checkpoint
from fiddler.converters.hf_config import read_hf_config
from fiddler.converters.safetensors_file import SafetensorsFile
from fiddler.errors import CheckpointError

TINY = Path(__file__).parents[1] / "data" / "tiny"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "hf"))


def edit_config(folder: Path, **values: object) -> None:
    """Set keys of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, **values: torch.Tensor | None) -> None:
    """Set tensors of model.safetensors, `__` standing for a dot; None removes one."""
    weights = load((folder / "model.safetensors").read_bytes())
    weights |= {name.replace("__", "."): value for name, value in values.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "attribute", "expected"),
    [
        ({}, "head_dim", 16),
        ({"head_dim": ...}, "head_dim", 16),
        ({"head_dim": 24}, "head_dim", 24),
        ({"hidden_size": 65, "head_dim": 16}, "embedding_length", 65),
        ({"num_key_value_heads": None}, "head_count_kv", 4),
        ({"sliding_window": ...}, "sliding_window", None),
        ({"sliding_window": 4096}, "sliding_window", 4096),
        ({}, "rope_freq_base", 1e6),
        ({"rope_parameters": ...}, "rope_freq_base", 1e6),
        ({"rope_parameters": ..., "rope_theta": 10000}, "rope_freq_base", 1e4),
        ({"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": None}, "rope_freq_base", 1e4),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": None}, "rope_freq_base", 5e5),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 10000}, "rope_freq_base", 1e4),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "default", "rope_theta": 7.0}},
            "rope_freq_base",
            7.0,
        ),
        ({"rope_parameters": ..., "rope_scaling": {"type": "default", "factor": 1.0}}, "rope_freq_base", 1e6),
        ({"hidden_act": ..., "partial_rotary_factor": 1.0}, "rms_epsilon", 1e-5),
        ({"rms_norm_eps": 0}, "rms_epsilon", 0.0),
        ({"attention_bias": False, "quantization_config": None}, "expert_count", 4),
    ],
)
def test_every_form_of_config_json_is_understood(folder, values, attribute, expected):
    edit_config(folder, **values)
    assert getattr(read_hf_config(folder).config, attribute) == expected


HF_NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "expert_feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "rms_epsilon": "rms_norm_eps",
    "sliding_window": "sliding_window",
}
KEYS = [*HF_NAMES.values(), "head_dim", "rope_parameters", "rope_theta", "tie_word_embeddings", "hidden_act"]


def assert_agrees_with_transformers(folder: Path) -> None:
    """Assert that config.json is read as transformers reads it."""
    hf_config, expected = (
        read_hf_config(folder),
        MixtralConfig.from_dict(json.loads((folder / "config.json").read_text())),
    )
    width = expected.hidden_size // expected.num_attention_heads
    assert {name: getattr(hf_config.config, name) for name in HF_NAMES} == {
        name: getattr(expected, key) for name, key in HF_NAMES.items()
    }
    assert hf_config.config.head_dim == (width if expected.head_dim is None else expected.head_dim)
    assert hf_config.config.rope_freq_base == expected.rope_parameters["rope_theta"]
    assert hf_config.tied == expected.tie_word_embeddings


@pytest.mark.parametrize("key", KEYS)
def test_an_absent_key_has_transformers_default(folder, key):
    edit_config(folder, **{"num_attention_heads": 8, key: ...})  # the default of 8 KV heads fits
    assert_agrees_with_transformers(folder)


def test_a_config_of_a_model_type_alone_has_transformers_defaults(folder):
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    assert_agrees_with_transformers(folder)


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"num_key_value_heads"}))  # transformers 4 accepts it: above
def test_null_is_accepted_or_refused_as_in_transformers(folder, key):
    edit_config(folder, **{key: None})
    try:
        MixtralConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except StrictDataclassError:
        with pytest.raises(CheckpointError, match=f"{key} is (null|None)"):
            read_hf_config(folder)
    else:
        assert_agrees_with_transformers(folder)


def test_opening_a_file_reads_its_header_only(folder):
    """A sparse file with a real header: 2**40 bytes of weights cannot have been read."""
    header = {"huge": {"dtype": "BF16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, 1 << 40]}}
    raw = json.dumps(header).encode()
    path = folder / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + (1 << 40))
    opened = SafetensorsFile(path)
    assert opened.rows(opened.tensors["huge"], 1 << 19, 2).shape == (2, 1 << 19)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spaces", [0, 1, 3])
def test_rows_are_read_only_arrays_at_any_alignment(tmp_path, dtype, spaces):
    expected = torch.randn(3, 5, 7).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"t": expected}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + spaces).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * spaces + raw[8 + length :])
    opened = SafetensorsFile(path)
    rows = opened.rows(opened.tensors["t"], 4, 3)
    assert rows.tobytes() == expected.view(15, 7)[4:7].contiguous().view(torch.uint8).numpy().tobytes()
    assert not rows.flags.writeable
    assert rows.flags.owndata  # no mapping behind it, which could end the process


def test_every_expert_of_the_published_layout_is_one_matrix(folder):
    checkpoint = Checkpoint.open(folder)
    matrices = list(checkpoint.matrices("blk.1.ffn_down_exps.weight"))
    assert [(matrix.count, matrix.width) for matrix in matrices] == [(64, 96)] * 4
    assert [matrix.stored.name for matrix in matrices] == [
        f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)
    ]


def test_fused_experts_give_the_same_matrices_as_separate_ones(folder):
    weights = load((folder / "model.safetensors").read_bytes())
    expected = {name: list(Checkpoint.open(folder).matrices(name)) for name in experts()}
    for layer in range(2):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (
            torch.stack([weights.pop(f"{moe}.experts.{expert}.w{n}.weight") for expert in range(4)]) for n in (1, 2, 3)
        )
        weights[f"{mlp}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        weights[f"{mlp}.experts.down_proj"] = w2
        weights[f"{mlp}.gate.weight"] = weights.pop(f"{moe}.gate.weight")
    (folder / "fused").mkdir()
    save_file(weights, folder / "fused" / "model.safetensors")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / name, folder / "fused")
    fused = Checkpoint.open(folder / "fused")
    for name, separate in expected.items():
        matrices = list(fused.matrices(name))
        assert len(matrices) == len(separate) == 4
        for one, other in zip(matrices, separate, strict=True):
            assert np.array_equal(one.rows(0, one.count), other.rows(0, other.count)), name


def experts() -> list[str]:
    return [f"blk.{layer}.ffn_{kind}_exps.weight" for layer in range(2) for kind in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("declared", "output", "tied", "warned"),
    [
        (False, "other", False, False),
        (..., "other", False, False),
        (True, "none", True, False),
        (True, "same", True, False),
        (True, "other", False, True),
        (True, "other type", False, True),
        (False, "same", False, False),
    ],
)
def test_embeddings_are_tied_if_declared_unless_a_different_output_is_stored(folder, declared, output, tied, warned):
    embedding = load((folder / "model.safetensors").read_bytes())["model.embed_tokens.weight"]
    edit_config(folder, tie_word_embeddings=declared)
    lm_head = {"none": None, "same": embedding, "other": embedding.flip(0), "other type": embedding.float()}[output]
    edit_weights(folder, lm_head__weight=None if lm_head is None else lm_head.contiguous().clone())
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied == tied
    assert any("tie_word_embeddings" in warning for warning in checkpoint.warnings) == warned


@pytest.mark.parametrize(
    ("casts", "expected"),
    [
        ({}, "bf16"),
        ({"norm": torch.float32}, "bf16"),
        ({"experts": torch.float16}, "f16"),
        ({"embed": torch.float16, "lm_head": torch.float16}, "bf16"),
        ({"": torch.float32}, "bf16"),
        ({"": torch.float16, "norm": torch.float32}, "f16"),
    ],
)
def test_the_dtype_is_that_of_most_weights(folder, casts, expected):
    weights = load((folder / "model.safetensors").read_bytes())
    for part, dtype in casts.items():
        weights = {name: value.to(dtype) if part in name else value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors")
    assert Checkpoint.open(folder).dtype == expected


@pytest.mark.parametrize("window, warned", [(None, False), (100, True), (512, False), (4096, False)])
def test_a_sliding_window_shorter_than_the_context_gives_a_warning(folder, window, warned):
    edit_config(folder, sliding_window=window)  # the context is 512 positions
    assert len(Checkpoint.open(folder).warnings) == warned


def test_rotary_tables_of_old_checkpoints_are_ignored(folder):
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    Checkpoint.open(folder)


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    Checkpoint.open(folder)


def test_a_checkpoint_is_named_after_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert Checkpoint.open(Path()).name == "hf"


def test_a_checkpoint_in_the_hub_cache_is_named_after_its_model(tmp_path):
    folder = (
        tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "fc7ac94680e38d7348cfa806e51218e6273104b0"
    )
    shutil.copytree(TINY, folder)
    assert Checkpoint.open(folder).name == "Mixtral-8x7B-v0.1"


def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, **{EXPERT.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT} is missing"):
        Checkpoint.open(folder)

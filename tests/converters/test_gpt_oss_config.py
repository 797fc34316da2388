"""config.json of gpt-oss: defaults, the published one, what is refused; and its experts' two forms."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fiddler.converters.conversion import convert
from fiddler.converters.differences import differences
from fiddler.converters.hf_config import read_hf_config
from fiddler.errors import CheckpointError
from fiddler.files.gguf_file import GgufFile
from fiddler.models.rope_scaling import RopeKind
from oracles.families import CASES, make_family_checkpoint

PUBLISHED = {  # of the 20 billion parameters
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **values}))
    return read_hf_config(folder).config


def test_a_model_type_alone_has_transformers_defaults(tmp_path):
    config, expected = read(tmp_path), GptOssConfig()
    assert (config.embedding_length, config.block_count) == (expected.hidden_size, expected.num_hidden_layers)
    assert (config.head_count, config.head_count_kv) == (expected.num_attention_heads, expected.num_key_value_heads)
    assert (config.head_dim, config.vocab_size) == (expected.head_dim, expected.vocab_size)
    assert config.expert_feed_forward_length == expected.intermediate_size
    assert (config.expert_count, config.expert_used_count) == (expected.num_local_experts, expected.num_experts_per_tok)
    assert (config.sliding_window, config.rms_epsilon) == (expected.sliding_window, expected.rms_norm_eps)
    assert config.rope_freq_base == expected.rope_parameters["rope_theta"]
    scaling = config.rope_scaling
    assert (scaling.kind, scaling.factor) == (RopeKind.YARN, expected.rope_parameters["factor"])
    assert scaling.original_context_length == expected.rope_parameters["original_max_position_embeddings"]
    assert scaling.truncate is expected.rope_parameters["truncate"] is False


def test_the_published_configuration_is_read_and_its_one_difference_told(tmp_path):
    config = read(tmp_path, **PUBLISHED)
    assert (config.block_count, config.expert_count, config.expert_used_count) == (24, 32, 4)
    assert [config.window(layer) for layer in range(4)] == [128, None, 128, None]
    assert config.cache_window is None
    assert config.rotated_scale == pytest.approx(0.1 * np.log(32) + 1)
    (line,) = differences(config)
    assert "truncate" in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"] * 36}, "layer_types is ['full_attention'"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"attention_bias": False}, "attention_bias is False; a gpt-oss has biases"),
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0; only 7.0 converts"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; only 1.702 converts"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised (quantization_config: 'fp8')"),
        ({"quantization_config": {}}, "the weights are quantised"),
    ],
)
def test_a_value_that_does_not_convert_is_refused_under_its_own_name(tmp_path, values, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_gate_and_up_are_every_second_column_of_the_stored_matrices(tmp_path):
    folder = make_family_checkpoint(CASES["gpt-oss, f16, YaRN truncated"], tmp_path / "hf")
    convert(folder, tmp_path / "model.gguf")
    file = GgufFile.open(tmp_path / "model.gguf")
    with safe_open(folder / "model.safetensors", "np") as stored:
        both = stored.get_tensor("model.layers.1.mlp.experts.gate_up_proj")  # [E, D, 2 F]
        biases = stored.get_tensor("model.layers.1.mlp.experts.gate_up_proj_bias")
    for first, name in enumerate(("gate", "up")):
        ours = file.array(f"blk.1.ffn_{name}_exps.weight").view(np.float16)
        np.testing.assert_array_equal(ours.reshape(8, 56, 72), both[:, :, first::2].swapaxes(1, 2))
        np.testing.assert_array_equal(file.array(f"blk.1.ffn_{name}_exps.bias"), biases[:, first::2])


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_blocks_of_mxfp4_hold_transformers_values_kept_or_decoded(tmp_path, dtype):
    folder = make_family_checkpoint(CASES["gpt-oss, MXFP4"], tmp_path / "hf")
    report = convert(folder, tmp_path / "model.gguf", dtype)
    file = GgufFile.open(tmp_path / "model.gguf")
    assert report.warnings == ()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for names, step, kept in (("gate_up_proj", 2, ("gate", "up")), ("down_proj", 1, ("down",))):
            prefix = f"model.layers.2.mlp.experts.{names}"
            parts = (stored.get_tensor(f"{prefix}_{part}") for part in ("blocks", "scales"))
            values = convert_moe_packed_tensors(*parts, dtype=torch.float32).transpose(1, 2)
            for first, name in enumerate(kept):
                tensor = f"blk.2.ffn_{name}_exps.weight"
                kind = gguf.GGMLQuantizationType[file.tensors[tensor].type]
                assert kind.name == ("BF16" if dtype else "MXFP4")
                raw = file.array(tensor).view(np.uint8) if dtype else file.stored(tensor)
                ours = gguf.dequantize(np.ascontiguousarray(raw), kind).reshape(8, *file.tensors[tensor].shape[1:])
                np.testing.assert_array_equal(ours, values[:, first::step].numpy())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_up_proj_scales", lambda tensor: None, "gate_up_proj_scales is missing"),
        ("gate_up_proj_blocks", lambda tensor: tensor[:, :-1], "has shape"),
        ("down_proj_blocks", lambda tensor: tensor.float(), "is F32; blocks of MXFP4 are U8"),
        ("down_proj_scales", lambda tensor: tensor[..., :-1], "has shape"),
    ],
)
def test_packed_experts_that_make_no_sense_are_refused(tmp_path, name, change, message):
    from safetensors.torch import load_file, save_file

    folder = make_family_checkpoint(CASES["gpt-oss, MXFP4"], tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.mlp.experts.{name}"
    changed = change(tensors.pop(key))
    tensors |= {} if changed is None else {key: changed.contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as error:
        convert(folder, tmp_path / "model.gguf")
    assert "\n" not in str(error.value)

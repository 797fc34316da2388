"""config.json of DBRX, whose keys have names of their own, some in objects: defaults, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from transformers import DbrxConfig

from fiddler.converters.conversion import convert
from fiddler.converters.differences import differences
from fiddler.converters.hf_config import read_hf_config
from fiddler.errors import CheckpointError
from fiddler.files.gguf_file import GgufFile
from oracles.families import CASES, make_family_checkpoint

PUBLISHED = {  # Databricks' own, of the 132 billion parameters
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_jitter_eps": 0.01, "moe_num_experts": 16, "moe_top_k": 4},
    "tie_word_embeddings": False,
}


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps({"model_type": "dbrx", **values}))
    return read_hf_config(folder).config


def test_a_model_type_alone_has_transformers_defaults(tmp_path):
    config, expected = read(tmp_path), DbrxConfig()
    assert config.embedding_length == expected.d_model
    assert config.block_count == expected.n_layers
    assert (config.head_count, config.head_count_kv) == (expected.n_heads, expected.attn_config.kv_n_heads)
    assert config.context_length == expected.max_seq_len
    assert config.vocab_size == expected.vocab_size
    assert config.expert_feed_forward_length == expected.ffn_config.ffn_hidden_size
    assert (config.expert_count, config.expert_used_count) == (
        expected.ffn_config.moe_num_experts,
        expected.ffn_config.moe_top_k,
    )
    assert config.clamp_kqv is expected.attn_config.clip_qkv is None
    assert config.rope_freq_base == expected.rope_parameters["rope_theta"]
    assert (config.rms_epsilon, config.router.renormalise) == (1e-5, True)


def test_the_published_configuration_is_read_from_its_objects(tmp_path):
    config = read(tmp_path, **PUBLISHED)
    assert (config.embedding_length, config.block_count, config.expert_feed_forward_length) == (6144, 40, 10752)
    assert (config.head_count, config.head_count_kv, config.head_dim) == (48, 8, 128)
    assert (config.expert_count, config.expert_used_count) == (16, 4)
    assert (config.clamp_kqv, config.rope_freq_base, config.context_length) == (8.0, 5e5, 32768)
    assert list(differences(config)) == []
    config = read(tmp_path, **PUBLISHED, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert config.rope_freq_base == 5e5


def test_routing_weights_of_no_norm_are_not_divided_and_llama_cpp_divides_them(tmp_path):
    config = read(tmp_path, ffn_config={"moe_normalize_expert_weights": None})
    assert not config.router.renormalise
    (line,) = differences(config)
    assert "moe_normalize_expert_weights null" in line


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"ffn_config": {"moe_normalize_expert_weights": 2.0}},
            "ffn_config.moe_normalize_expert_weights is 2.0; only 1.0",
        ),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_config.ffn_act_fn.name is 'gelu'"),
        ({"ffn_config": {"ffn_act_fn": "gelu"}}, "ffn_act_fn is 'gelu'; it must be an object"),
        ({"ffn_config": {"moe_top_k": None}}, "ffn_config.moe_top_k is null"),
        ({"ffn_config": {"moe_num_experts": "16"}}, "ffn_config.moe_num_experts is '16'; it must be an integer"),
        ({"attn_config": 3}, "attn_config is 3; it must be an object"),
        ({"attn_config": {"clip_qkv": -8}}, "clamp_kqv is -8.0"),
        ({"attn_config": {"kv_n_heads": 3}}, "not a multiple of head_count_kv 3"),
        ({"d_model": 2049}, "d_model 2049 over n_heads 16 is not an integer"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False converts"),
        ({"attn_config": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta has the values [10000.0, 500000.0]"),
        (
            {"attn_config": {"rope_theta": 5e5}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta has the values [10000.0, 500000.0]; keep the right one",
        ),
    ],
)
def test_a_value_that_does_not_convert_is_refused_under_its_own_name(tmp_path, values, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_each_experts_part_of_the_stored_matrices_is_its_own_and_the_last_is_transposed(tmp_path):
    folder = make_family_checkpoint(CASES["dbrx, f16, not renormalised"], tmp_path / "hf")
    convert(folder, tmp_path / "model.gguf")
    file = GgufFile.open(tmp_path / "model.gguf")
    with safe_open(folder / "model.safetensors", "np") as stored:
        for name, kind in (("w1", "gate"), ("v1", "up"), ("w2", "down")):
            experts = stored.get_tensor(f"transformer.blocks.1.ffn.experts.mlp.{name}").reshape(8, 40, 72)
            expected = experts.swapaxes(1, 2) if kind == "down" else experts
            ours = file.array(f"blk.1.ffn_{kind}_exps.weight").view(np.float16)
            np.testing.assert_array_equal(ours.reshape(expected.shape), expected)

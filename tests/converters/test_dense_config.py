"""config.json of Llama and Mistral: transformers' defaults, the window, what is refused."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, MistralConfig

from fiddler.converters.differences import differences
from fiddler.converters.hf_config import read_hf_config
from fiddler.errors import CheckpointError
from fiddler.models.rope_scaling import RopeKind

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return read_hf_config(folder)


@pytest.mark.parametrize(
    "kind, expected, window",
    [("llama", LlamaConfig(), None), ("mistral", MistralConfig(), 4096)],
    ids=["llama", "mistral"],
)
def test_a_model_type_alone_has_transformers_defaults(tmp_path, kind, expected, window):
    found = read(tmp_path, model_type=kind)
    config = found.config
    assert (config.vocab_size, config.embedding_length) == (expected.vocab_size, expected.hidden_size)
    assert config.block_count == config.leading_dense_block_count == expected.num_hidden_layers
    assert config.feed_forward_length == expected.intermediate_size
    assert (config.head_count, config.head_count_kv) == (expected.num_attention_heads, expected.num_key_value_heads)
    assert (config.head_dim, config.context_length) == (expected.head_dim, expected.max_position_embeddings)
    assert config.rms_epsilon == expected.rms_norm_eps
    assert config.rope_freq_base == expected.rope_parameters["rope_theta"]
    assert found.tied is expected.tie_word_embeddings
    assert config.sliding_window == window == getattr(expected, "sliding_window", None)
    assert config.expert_count == config.expert_used_count == 0


def test_a_window_counts_for_mistral_only_as_in_transformers(tmp_path):
    assert read(tmp_path, model_type="mistral", sliding_window=64).config.sliding_window == 64
    assert read(tmp_path, model_type="mistral", sliding_window=None).config.sliding_window is None
    assert read(tmp_path, model_type="llama", sliding_window=64).config.sliding_window is None


def test_what_llama_cpp_computes_otherwise_is_mistrals_window_and_not_llamas_rope(tmp_path):
    (line,) = differences(read(tmp_path, model_type="mistral").config)
    assert "ignores sliding_window 4096" in line
    config = read(
        tmp_path, model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=131072
    ).config
    assert config.rope_scaling.kind is RopeKind.DIVISORS
    assert list(differences(config)) == []


@pytest.mark.parametrize(
    "values, says",
    [
        ({"attention_bias": True}, "attention_bias is True; a Llama or Mistral has no biases"),
        ({"mlp_bias": True}, "mlp_bias is True; a Llama or Mistral has no biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; a Llama or Mistral uses 'silu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"intermediate_size": 0}, "feed_forward_length is 0"),
        ({"num_hidden_layers": 0}, "block_count is 0"),
        ({"num_key_value_heads": 3}, "not a multiple of head_count_kv 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_arithmetic_that_does_not_run_is_refused_by_its_key(tmp_path, kind, values, says):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, model_type=kind, **values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

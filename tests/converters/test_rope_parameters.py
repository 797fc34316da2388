"""RoPE in config.json: its scaling is read as transformers reads it, and a part that does not convert is refused."""

from __future__ import annotations

import json

import pytest

from fiddler.converters.hf_config import read_hf_config
from fiddler.errors import CheckpointError
from fiddler.models.rope_scaling import RopeKind, RopeScaling

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}


def read(folder, **values):
    values = {"model_type": "mixtral", "head_dim": 8, "max_position_embeddings": 256, **values}
    (folder / "config.json").write_text(json.dumps(values))
    return read_hf_config(folder).config


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, RopeScaling(RopeKind.LINEAR, 2.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling(RopeKind.LINEAR, 2.0)),
        (
            {"rope_parameters": YARN | {"factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "truncate": False}},
            RopeScaling(RopeKind.YARN, 4.0, 64, 1.5, beta_fast=16.0, truncate=False),
        ),
        (
            {"rope_parameters": YARN | {"factor": None, "attention_factor": 1.0}},
            RopeScaling(RopeKind.YARN, 4.0, 64, 1.0),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
            RopeScaling(RopeKind.YARN, 4.0, 256, 1.0),
        ),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, None),
    ],
)
def test_scaling_is_read_from_both_keys(tmp_path, values, expected):
    assert read(tmp_path, **values).rope_scaling == expected


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rope_parameters": {"factor": 4.0}}, "factor is 4.0, but its rope_type is 'default'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
            "'beta_fast' is 32; 'linear' has no such key",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "RoPE's factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is "),
        ({"rope_parameters": YARN | {"factor": -4.0}}, "rope.scaling.factor is -4.0"),
        (
            {"rope_parameters": YARN | {"factor": 4.0, "original_max_position_embeddings": -1}},
            "original_context_length is -1",
        ),
        ({"rope_theta": 1.0, "rope_parameters": YARN | {"factor": 4.0}}, "freq_base is 1.0; YaRN needs one above 1"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_parameters and rope_scaling differ",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "RoPE's factors are 8.0, None and None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one RoPE for all layers converts"),
    ],
)
def test_a_scaling_that_does_not_convert_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

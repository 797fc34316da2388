"""config.json of DeepSeek-V2 and V3: transformers' defaults, what is refused, what llama.cpp computes otherwise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from fiddler.converters.conversion import convert
from fiddler.converters.differences import differences
from fiddler.converters.hf_config import read_hf_config
from fiddler.errors import CheckpointError
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.config import LatentWidths
from fiddler.models.rope_scaling import RopeKind, RopeScaling
from oracles.families import CASES, make_family_checkpoint


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return read_hf_config(folder).config


@pytest.mark.parametrize(
    "kind, expected", [("deepseek_v2", DeepseekV2Config()), ("deepseek_v3", DeepseekV3Config())], ids=["V2", "V3"]
)
def test_a_model_type_alone_has_transformers_defaults(tmp_path, kind, expected):
    used = expected.num_experts_per_tok or 6  # DeepSeek-V2 has no default
    config = read(tmp_path, model_type=kind, num_experts_per_tok=used)
    assert config.latent == LatentWidths(
        latent=expected.kv_lora_rank,
        key=expected.qk_nope_head_dim + expected.qk_rope_head_dim,
        value=expected.v_head_dim,
        query=expected.q_lora_rank,
    )
    assert config.rotated == expected.qk_rope_head_dim
    assert config.expert_count == expected.n_routed_experts
    assert config.leading_dense_block_count == expected.first_k_dense_replace
    assert config.expert_shared_feed_forward_length == expected.n_shared_experts * expected.moe_intermediate_size
    assert config.rope_scaling is None
    rule = RouterRule(renormalise=False)
    if kind == "deepseek_v3":
        rule = RouterRule(Scoring.SIGMOID, True, expected.routed_scaling_factor, expected.n_group, expected.topk_group)
    assert config.router == rule


def test_a_v2s_groups_count_with_its_method_only(tmp_path):
    values = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    assert read(tmp_path, **values, topk_method="greedy").router.groups == 1
    router = read(tmp_path, **values, topk_method="group_limited_greedy").router
    assert (router.groups, router.groups_used) == (8, 3)


@pytest.mark.parametrize(
    "mscale, factor", [({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0), ({"mscale": 1.0}, 1.3688879454113936)]
)
def test_yarns_factors_are_those_of_transformers(tmp_path, mscale, factor):
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, **mscale}
    config = read(tmp_path, model_type="deepseek_v2", num_experts_per_tok=6, rope_scaling=rope)
    expected = RopeScaling(RopeKind.YARN, 40.0, 4096, factor, log_multiplier=mscale.get("mscale_all_dim", 0.0))
    assert config.rope_scaling == expected


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False; only True converts"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v2", {"q_lora_rank": 0}, "q_lora_rank is 0"),
        ("deepseek_v2", {"kv_lora_rank": None}, "kv_lora_rank is null"),
        ("deepseek_v2", {"qk_nope_head_dim": 0}, "key_length_mla is 64"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing"),
        ("deepseek_v2", {"rope_scaling": {"type": "linear", "factor": 2, "mscale_all_dim": 1}}, "has no such key"),
    ],
)
def test_arithmetic_without_an_equivalent_is_refused(tmp_path, kind, values, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, model_type=kind, num_experts_per_tok=6, **values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


V2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 6}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 0.7}
MIXTRAL, QWEN3 = (
    {"model_type": "mixtral", "head_dim": 128},
    {"model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": 128},
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "values, expected",
    [
        (V2 | {"rope_scaling": YARN}, None),
        (V2 | {"rope_scaling": YARN | {"mscale": 1.0}}, "mscale to be mscale_all_dim"),
        (V2 | {"rope_scaling": YARN | {"mscale_all_dim": 0}}, "mscale to be mscale_all_dim"),
        (V2 | {"rope_scaling": YARN | {"truncate": False}}, "truncate false"),
        (V2 | {"rope_scaling": YARN | {"beta_fast": 16}}, "beta_fast"),
        (V2 | {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, "groups of experts by their two"),
        (MIXTRAL | {"rope_parameters": YARN | {"mscale": 1.0}}, None),
        (MIXTRAL | {"rope_parameters": LLAMA3}, None),
        (QWEN3 | {"rope_parameters": LLAMA3}, "does not open a Qwen3-MoE"),
        (MIXTRAL | {"sliding_window": 4096}, "ignores sliding_window 4096"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_said(tmp_path, values, expected):
    lines = list(differences(read(tmp_path, **values)))
    assert len(lines) == (expected is not None)
    assert all(expected in line for line in lines)


def test_layers_that_predict_further_tokens_are_skipped(tmp_path):
    folder = make_family_checkpoint(CASES["deepseek2, V3"], tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    convert(folder, tmp_path / "without.gguf")
    tensors = load_file(folder / "model.safetensors")
    width = config["hidden_size"]
    tensors |= {
        "model.layers.3.eh_proj.weight": torch.zeros(width, 2 * width, dtype=torch.bfloat16),
        "model.layers.3.self_attn.kv_b_proj.weight": tensors["model.layers.0.self_attn.kv_b_proj.weight"].clone(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\..* is not part of"):
        convert(folder, tmp_path / "refused.gguf")
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    convert(folder, tmp_path / "with.gguf")
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()

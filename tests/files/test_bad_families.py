"""Bad files of every family beside Mixtral: one line that names the value; and the good file they are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

import fiddler
from fiddler.converters.conversion import convert
from fiddler.errors import FileFormatError
from fiddler.files.inspection import describe
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from oracles.bad_gguf import ints
from oracles.small_families import GOOD, drafted
from tools.random_model import write_random_model

NAN = math.nan


@dataclass(frozen=True)
class Bad:
    says: str
    metadata: dict[str, object] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)


BAD = {
    "qwen3moe": [
        Bad("blk.1.attn_q_norm.weight is missing", shapes={"blk.1.attn_q_norm.weight": None}),
        Bad("shape (32,), the metadata imply (8,)", shapes={"blk.0.attn_k_norm.weight": (32,)}),
        Bad("blk.0.ffn_gate.0.weight is not part of a Qwen3-MoE", shapes={"blk.0.ffn_gate.0.weight": (16, 32)}),
        Bad("blk.0.attn_q.bias is not part of a Qwen3-MoE", shapes={"blk.0.attn_q.bias": (32,)}),
        Bad("metadata imply (6, 20, 32)", {"expert_feed_forward_length": 20}),
        Bad("expert_weights_norm is 1; it must be true or false", {"expert_weights_norm": 1}),
        Bad("expert_gating_func is 4; only 1", {"expert_gating_func": 4}),
        Bad("rope.dimension_count is 10", {"rope.dimension_count": 10}),
        Bad("expert_weights_scale is nan", {"expert_weights_scale": NAN}),
        Bad("rope.scaling.factor is nan", {"rope.scaling.type": "yarn", "rope.scaling.factor": NAN}),
    ],
    "qwen2moe": [
        Bad("blk.0.attn_v.bias is missing", shapes={"blk.0.attn_v.bias": None}),
        Bad("shape (16, 32), the metadata imply (24, 32)", shapes={"blk.1.ffn_up_shexp.weight": (16, 32)}),
        Bad("blk.1.ffn_gate_inp_shexp.weight has shape (24,)", shapes={"blk.1.ffn_gate_inp_shexp.weight": (24,)}),
        Bad("expert_shared_feed_forward_length is 0", {"expert_shared_feed_forward_length": 0}),
        Bad("ffn_gate_shexp.weight has shape", {"expert_shared_feed_forward_length": 1 << 20}),
        Bad("expert_weights_scale is nan", {"expert_weights_scale": NAN}),
    ],
    "olmoe": [
        Bad("shape (8,), the metadata imply (32,)", shapes={"blk.0.attn_q_norm.weight": (8,)}),
        Bad("blk.1.attn_k_norm.weight is missing", shapes={"blk.1.attn_k_norm.weight": None}),
        Bad("clamp_kqv is nan", {"attention.clamp_kqv": NAN}),
        Bad("clamp_kqv is -1.0", {"attention.clamp_kqv": -1.0}),
        Bad("expert_used_count is 7", {"expert_used_count": 7}),
        Bad("layer_norm_rms_epsilon is nan", {"attention.layer_norm_rms_epsilon": NAN}),
    ],
    "granitemoe": [
        Bad("logit_scale is nan", {"logit_scale": NAN}),
        Bad("residual_scale is -0.25", {"residual_scale": -0.25}),
        Bad("attention_scale is inf", {"attention.scale": math.inf}),
        Bad("embedding_scale is '12'", {"embedding_scale": "12"}),
        Bad("blk.0.ffn_down_shexp.weight is missing", shapes={"blk.0.ffn_down_shexp.weight": None}),
    ],
    "deepseek": [
        Bad("leading_dense_block_count is 2; it must lie between 0 and 1", {"leading_dense_block_count": 2}),
        Bad("blk.0.ffn_gate.weight has shape (48, 32), the metadata imply (50, 32)", {"feed_forward_length": 50}),
        Bad("blk.0.ffn_gate_inp.weight is missing", {"leading_dense_block_count": 0}),
        Bad("blk.0.ffn_gate_exps.weight is not part", shapes={"blk.0.ffn_gate_exps.weight": (6, 16, 32)}),
        Bad("expert_weights_scale is nan", {"expert_weights_scale": NAN}),
    ],
    "glm4moe": [
        Bad("2 of 4 groups of experts are used; 6 experts", {"expert_group_count": 4}),
        Bad("4 of 3 groups of experts are used", {"expert_group_used_count": 4}),
        Bad("expert_used_count is 5, but 2 of 3 groups have only 4 experts", {"expert_used_count": 5}),
        Bad("blk.1.exp_probs_b.bias has shape (5,)", shapes={"blk.1.exp_probs_b.bias": (5,)}),
        Bad("blk.0.attn_q_norm.weight is missing", shapes={"blk.0.attn_q_norm.weight": None}),
        Bad("no layer has attn_k.bias, but", shapes={f"blk.{layer}.attn_k.bias": None for layer in (0, 1)}),
        Bad("no layer has attn_k_norm.weight", shapes={f"blk.{layer}.attn_k_norm.weight": None for layer in (0, 1)}),
        Bad("nextn_predict_layers is 3; it must lie between 0 and 1", {"nextn_predict_layers": 3}),
        Bad("nextn_predict_layers is 4294967295; it", {"nextn_predict_layers": 2**32 - 1}),
        Bad("blk.2.attn_q.weight is not part", shapes={"blk.2.attn_q.weight": (32, 32)}),
        Bad("expert_weights_scale is nan", {"expert_weights_scale": NAN}),
    ],
    "deepseek2": [
        Bad("no layer has ffn_up_shexp.weight, but ffn_gate_shexp", shapes={"blk.1.ffn_up_shexp.weight": None}),
        Bad("no layer has attn_q_a_norm", shapes={f"blk.{layer}.attn_q_a_norm.weight": None for layer in (0, 1)}),
        Bad("blk.1.attn_k_b.weight is missing", shapes={"blk.1.attn_k_b.weight": None}),
        Bad("blk.0.attn_v_b.weight has shape (4, 5, 16)", shapes={"blk.0.attn_v_b.weight": (4, 5, 16)}),
        Bad("key_length is 20; kv_lora_rank and rope.dimension_count make 19", {"attention.kv_lora_rank": 15}),
        Bad("blk.0.attn_q_a.weight has shape (10, 32), the metadata imply (12, 32)", {"attention.q_lora_rank": 12}),
        Bad("blk.0.attn_kv_a_norm.weight has shape (20,)", shapes={"blk.0.attn_kv_a_norm.weight": (20,)}),
        Bad("expert_weights_scale is nan", {"expert_weights_scale": NAN}),
        Bad("yarn_log_multiplier is nan", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                           "rope.scaling.yarn_log_multiplier": NAN}),
        Bad("nextn_predict_layers is 2", {"nextn_predict_layers": 2}),
    ],
    "dbrx": [
        Bad("attn_qkv.weight has shape (64, 32), the metadata imply (48, 32)", {"attention.head_count_kv": 1}),
        Bad("blk.0.attn_q.weight is not part of a DBRX", shapes={"blk.0.attn_q.weight": (32, 32)}),
        Bad("blk.1.attn_output_norm.weight is missing", shapes={"blk.1.attn_output_norm.weight": None}),
        Bad("clamp_kqv is inf", {"attention.clamp_kqv": math.inf}),
        Bad("layer_norm_epsilon is 1.0; it must lie in [0, 1)", {"attention.layer_norm_epsilon": 1.0}),
        Bad("blk.0.attn_norm.bias is not part", shapes={"blk.0.attn_norm.bias": (32,)}),
    ],
    "gpt-oss": [
        Bad("blk.1.attn_sinks.weight is missing", shapes={"blk.1.attn_sinks.weight": None}),
        Bad("blk.0.attn_sinks.weight has shape (2,), the metadata imply", shapes={"blk.0.attn_sinks.weight": (2,)}),
        Bad("sliding_window_pattern is 3; only 2", {"attention.sliding_window_pattern": 3}),
        Bad("sliding_window_pattern is 1; only 2", {"attention.sliding_window_pattern": 1}),
        Bad("sliding_window is 0; it must lie between 1", {"attention.sliding_window": 0}),
        Bad("blk.0.ffn_gate_exps.bias has shape (6, 15)", shapes={"blk.0.ffn_gate_exps.bias": (6, 15)}),
        Bad("blk.1.ffn_down_exps.bias is missing", shapes={"blk.1.ffn_down_exps.bias": None}),
        Bad("blk.0.attn_output.bias is missing", shapes={"blk.0.attn_output.bias": None}),
        Bad("blk.0.ffn_gate_inp.bias is missing", shapes={"blk.0.ffn_gate_inp.bias": None}),
        Bad("blk.0.ffn_norm.weight is not part of a gpt-oss", shapes={"blk.0.ffn_norm.weight": (32,)}),
    ],
    "llama": [
        Bad("expert_used_count is 2; a Llama or Mistral has no experts", {"expert_used_count": 2}),
        Bad("blk.0.ffn_gate_inp.weight is missing", {"expert_count": 4, "expert_used_count": 2}),
        Bad("blk.1.ffn_up.weight is missing", shapes={"blk.1.ffn_up.weight": None}),
        Bad("blk.0.ffn_down.weight has shape (48, 32)", shapes={"blk.0.ffn_down.weight": (48, 32)}),
        Bad("blk.0.attn_q.bias is not part of a Llama or Mistral", shapes={"blk.0.attn_q.bias": (32,)}),
        Bad("blk.0.ffn_gate_exps.weight is not part", shapes={"blk.0.ffn_gate_exps.weight": (6, 16, 32)}),
        Bad("feed_forward_length is 0", {"feed_forward_length": 0}),
        Bad("head_count_kv 3", {"attention.head_count_kv": 3}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", GOOD)
def test_the_good_file_opens_with_its_hyper_parameters(tmp_path, family):
    write_random_model(tmp_path / "model.gguf", GOOD[family], DEMO_MODEL)
    config = ModelFile.open(tmp_path / "model.gguf").config
    assert config == replace(GOOD[family], rms_epsilon=config.rms_epsilon)
    assert config.rms_epsilon == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("family", "bad"),
    [(family, bad) for family, cases in BAD.items() for bad in cases],
    ids=lambda value: value if isinstance(value, str) else value.says,
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_value(tmp_path, family, bad):
    path = tmp_path / "model.gguf"
    write_random_model(path, GOOD[family], DEMO_MODEL, metadata=bad.metadata, shapes=bad.shapes)
    with pytest.raises(FileFormatError) as caught:
        ModelFile.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert bad.says in message
    assert "\n" not in message


@pytest.mark.parametrize(("pattern", "opens"), [([1, 0], True), ([0, 1], False), ([1], False), ([1, 0, 1], False)])
def test_a_window_s_pattern_may_have_a_number_a_layer(tmp_path, pattern, opens):
    draft, path = drafted("gpt-oss"), tmp_path / "model.gguf"
    draft.set("gpt-oss.attention.sliding_window_pattern", ints(pattern))
    path.write_bytes(draft.to_bytes())
    if opens:
        assert ModelFile.open(path).config.sliding_window == 12
        return
    with pytest.raises(FileFormatError, match=r"sliding_window_pattern is .*; only 2"):
        ModelFile.open(path)


@pytest.mark.parametrize("family", ["glm4moe", "deepseek2"])
def test_a_block_that_predicts_further_tokens_is_skipped(tmp_path, family):
    config = replace(GOOD[family], vocab_size=2048)
    shapes = {tensor: config.shape(each) for tensor, each in config.tensors(tied=False).items()}
    further = {name.replace("blk.1.", "blk.2."): shape for name, shape in shapes.items() if name.startswith("blk.1.")}
    further |= {"blk.2.nextn.eh_proj.weight": (32, 64), "blk.2.nextn.enorm.weight": (32,)}
    further |= {"blk.2.attn_q.weight": (4, 32), "blk.2.exp_probs_b.bias": (5,)}  # not even looked at
    keys = {"block_count": 3, "nextn_predict_layers": 1}
    write_random_model(tmp_path / "without.gguf", config, DEMO_MODEL)
    write_random_model(tmp_path / "with.gguf", config, DEMO_MODEL, metadata=keys, shapes=further)
    assert any(".nextn." in name for name in ModelFile.open(tmp_path / "with.gguf").file.tensors)
    assert describe(tmp_path / "with.gguf")["bytes"]["dense"] == describe(tmp_path / "without.gguf")["bytes"]["dense"]
    convert(tmp_path / "with.gguf", tmp_path / "again.gguf")
    assert ModelFile.open(tmp_path / "again.gguf").file.tensors.keys() == shapes.keys()
    expected = fiddler.load(tmp_path / "without.gguf", device="cpu").logits([1, 2, 3])
    for name in ("with", "again"):
        assert torch.equal(fiddler.load(tmp_path / f"{name}.gguf", device="cpu").logits([1, 2, 3]), expected)


def test_a_vector_with_a_leading_one_in_its_shape_is_that_vector(tmp_path):
    """llama.cpp's converter writes Qwen2-MoE's shared router as [1, D]."""
    names = [f"blk.{layer}.ffn_gate_inp_shexp.weight" for layer in (0, 1)]
    for path, shape in (("a", (32,)), ("b", (1, 32))):
        write_random_model(tmp_path / f"{path}.gguf", GOOD["qwen2moe"], DEMO_MODEL, shapes=dict.fromkeys(names, shape))
    assert ModelFile.open(tmp_path / "b.gguf").file.tensors[names[1]].shape == (1, 32)
    convert(tmp_path / "b.gguf", tmp_path / "c.gguf")
    expected = fiddler.load(tmp_path / "a.gguf", device="cpu").logits([1, 2, 3])
    for path in ("b.gguf", "c.gguf"):
        assert torch.equal(fiddler.load(tmp_path / path, device="cpu").logits([1, 2, 3]), expected)

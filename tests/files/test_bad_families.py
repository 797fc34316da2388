"""Bad files of every family beside Mixtral: one line that names the value; and the good file they are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest

from fiddler.errors import FileFormatError
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.models import ARCHITECTURES, LLAMA
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.config import Config
from tools.random_model import write_random_model

NAN = math.nan
PLAIN = Config(ARCHITECTURES["qwen3moe"], 4096, 128, 32, 2, 16, 4, 2, 8, 6, 2, 1e-6, 1e4)
DENSE = {"feed_forward_length": 48, "leading_dense_block_count": 1, "expert_shared_feed_forward_length": 16}
GOOD = {
    "qwen3moe": PLAIN,
    "qwen2moe": replace(PLAIN, architecture=ARCHITECTURES["qwen2moe"], router=RouterRule(renormalise=False),
                        expert_shared_feed_forward_length=24),
    "olmoe": replace(PLAIN, architecture=ARCHITECTURES["olmoe"], router=RouterRule(renormalise=False), clamp_kqv=2.0),
    "granitemoe": replace(PLAIN, architecture=ARCHITECTURES["granitemoe"], expert_shared_feed_forward_length=24,
                          attention_scale=0.5, embedding_scale=12.0, residual_scale=0.25, logit_scale=8.0),
    "deepseek": replace(PLAIN, architecture=ARCHITECTURES["deepseek"], router=RouterRule(renormalise=False), **DENSE),
    "glm4moe": replace(PLAIN, architecture=ARCHITECTURES["glm4moe"], rope_dimension_count=4, **DENSE,
                       router=RouterRule(Scoring.SIGMOID, scale=1.5, groups=3, groups_used=2)),
    "dbrx": replace(PLAIN, architecture=ARCHITECTURES["dbrx"], clamp_kqv=8.0),
    "llama": Config(LLAMA, 4096, 128, 32, 2, 0, 4, 2, 8, 0, 0, 1e-6, 1e4, sliding_window=12, feed_forward_length=48,
                    leading_dense_block_count=2),
}  # fmt: skip


@dataclass(frozen=True)
class Bad:
    says: str
    metadata: dict[str, object] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)


BAD = {
    "qwen3moe": [
        Bad("blk.1.attn_q_norm.weight is missing", shapes={"blk.1.attn_q_norm.weight": None}),
        Bad("shape (32,), the metadata imply (8,)", shapes={"blk.0.attn_k_norm.weight": (32,)}),
        Bad("blk.0.attn_q.bias is not part of a Qwen3-MoE", shapes={"blk.0.attn_q.bias": (32,)}),
        Bad("metadata imply (6, 20, 32)", {"expert_feed_forward_length": 20}),
        Bad("expert_weights_norm is 1; it must be true or false", {"expert_weights_norm": 1}),
        Bad("expert_gating_func is 4; only 1", {"expert_gating_func": 4}),
        Bad("rope.dimension_count is 10", {"rope.dimension_count": 10}),
    ],
    "qwen2moe": [
        Bad("blk.0.attn_v.bias is missing", shapes={"blk.0.attn_v.bias": None}),
        Bad("shape (16, 32), the metadata imply (24, 32)", shapes={"blk.1.ffn_up_shexp.weight": (16, 32)}),
        Bad("blk.1.ffn_gate_inp_shexp.weight has shape (24,)", shapes={"blk.1.ffn_gate_inp_shexp.weight": (24,)}),
        Bad("expert_shared_feed_forward_length is 0", {"expert_shared_feed_forward_length": 0}),
        Bad("ffn_gate_shexp.weight has shape", {"expert_shared_feed_forward_length": 1 << 20}),
    ],
    "olmoe": [
        Bad("shape (8,), the metadata imply (32,)", shapes={"blk.0.attn_q_norm.weight": (8,)}),
        Bad("blk.1.attn_k_norm.weight is missing", shapes={"blk.1.attn_k_norm.weight": None}),
        Bad("clamp_kqv is nan", {"attention.clamp_kqv": NAN}),
        Bad("clamp_kqv is -1.0", {"attention.clamp_kqv": -1.0}),
        Bad("expert_used_count is 7", {"expert_used_count": 7}),
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
        Bad("block_count is -1", {"nextn_predict_layers": 3}),
    ],
    "dbrx": [
        Bad("attn_qkv.weight has shape (64, 32), the metadata imply (48, 32)", {"attention.head_count_kv": 1}),
        Bad("blk.0.attn_q.weight is not part of a DBRX", shapes={"blk.0.attn_q.weight": (32, 32)}),
        Bad("blk.1.attn_output_norm.weight is missing", shapes={"blk.1.attn_output_norm.weight": None}),
        Bad("clamp_kqv is inf", {"attention.clamp_kqv": math.inf}),
        Bad("layer_norm_epsilon is 1.0; it must lie in [0, 1)", {"attention.layer_norm_epsilon": 1.0}),
        Bad("blk.0.attn_norm.bias is not part", shapes={"blk.0.attn_norm.bias": (32,)}),
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
}


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

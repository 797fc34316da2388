"""Architectures as values: tensors against the `gguf` package and converted files; paths that know some parts only."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import gguf
import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler.converters.conversion import convert
from fiddler.cpu import loader as cpu_loader
from fiddler.cpu.loader import can_decode
from fiddler.errors import FileFormatError
from fiddler.files.model_file import ModelFile
from fiddler.gpu import decoder, dense_weights
from fiddler.kernels.formats.half import BF16, F16
from fiddler.kernels.formats.mxfp4 import MXFP4
from fiddler.loading import DEMO_MODEL
from fiddler.models import ARCHITECTURES, MIXTRAL, transformer
from fiddler.models.architecture import (
    EXPERTS,
    FLOATS,
    Activation,
    Architecture,
    AttentionBias,
    ExpertBias,
    Norm,
    QkNorm,
    Role,
    Rotary,
    Sinks,
    Window,
    first_unknown,
)
from fiddler.models.config import Config, LatentWidths
from fiddler.models.deepseek import DEEPSEEK2
from fiddler.models.rope_scaling import RopeKind, RopeScaling
from fiddler.models.transformer import Transformer
from oracles.reference import TINY

GGUF_ROLES = {
    Role.TOKEN_EMBEDDING: gguf.MODEL_TENSOR.TOKEN_EMBD,
    Role.ATTENTION_NORM: gguf.MODEL_TENSOR.ATTN_NORM,
    Role.QUERY: gguf.MODEL_TENSOR.ATTN_Q,
    Role.KEY: gguf.MODEL_TENSOR.ATTN_K,
    Role.VALUE: gguf.MODEL_TENSOR.ATTN_V,
    Role.QUERY_KEY_VALUE: gguf.MODEL_TENSOR.ATTN_QKV,
    Role.ATTENTION_OUTPUT: gguf.MODEL_TENSOR.ATTN_OUT,
    Role.OUTPUT_BIAS: gguf.MODEL_TENSOR.ATTN_OUT,
    Role.SINKS: gguf.MODEL_TENSOR.ATTN_SINKS,
    Role.ROUTER_BIAS: gguf.MODEL_TENSOR.FFN_GATE_INP,
    Role.GATE_BIAS: gguf.MODEL_TENSOR.FFN_GATE_EXP,
    Role.UP_BIAS: gguf.MODEL_TENSOR.FFN_UP_EXP,
    Role.DOWN_BIAS: gguf.MODEL_TENSOR.FFN_DOWN_EXP,
    Role.FFN_NORM: gguf.MODEL_TENSOR.FFN_NORM,
    Role.ROUTER: gguf.MODEL_TENSOR.FFN_GATE_INP,
    Role.GATE: gguf.MODEL_TENSOR.FFN_GATE_EXP,
    Role.UP: gguf.MODEL_TENSOR.FFN_UP_EXP,
    Role.DOWN: gguf.MODEL_TENSOR.FFN_DOWN_EXP,
    Role.QUERY_BIAS: gguf.MODEL_TENSOR.ATTN_Q,
    Role.KEY_BIAS: gguf.MODEL_TENSOR.ATTN_K,
    Role.VALUE_BIAS: gguf.MODEL_TENSOR.ATTN_V,
    Role.QUERY_NORM: gguf.MODEL_TENSOR.ATTN_Q_NORM,
    Role.KEY_NORM: gguf.MODEL_TENSOR.ATTN_K_NORM,
    Role.QUERY_DOWN: gguf.MODEL_TENSOR.ATTN_Q_A,
    Role.QUERY_DOWN_NORM: gguf.MODEL_TENSOR.ATTN_Q_A_NORM,
    Role.QUERY_UP: gguf.MODEL_TENSOR.ATTN_Q_B,
    Role.LATENT: gguf.MODEL_TENSOR.ATTN_KV_A_MQA,
    Role.LATENT_NORM: gguf.MODEL_TENSOR.ATTN_KV_A_NORM,
    Role.KEY_UP: gguf.MODEL_TENSOR.ATTN_K_B,
    Role.VALUE_UP: gguf.MODEL_TENSOR.ATTN_V_B,
    Role.KEY_VALUE_UP: gguf.MODEL_TENSOR.ATTN_KV_B,
    Role.SELECTION_BIAS: gguf.MODEL_TENSOR.FFN_EXP_PROBS_B,
    Role.SHARED_ROUTER: gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP,
    Role.SHARED_GATE: gguf.MODEL_TENSOR.FFN_GATE_SHEXP,
    Role.SHARED_UP: gguf.MODEL_TENSOR.FFN_UP_SHEXP,
    Role.SHARED_DOWN: gguf.MODEL_TENSOR.FFN_DOWN_SHEXP,
    Role.DENSE_GATE: gguf.MODEL_TENSOR.FFN_GATE,
    Role.DENSE_UP: gguf.MODEL_TENSOR.FFN_UP,
    Role.DENSE_DOWN: gguf.MODEL_TENSOR.FFN_DOWN,
    Role.OUTPUT_NORM: gguf.MODEL_TENSOR.OUTPUT_NORM,
    Role.OUTPUT: gguf.MODEL_TENSOR.OUTPUT,
}
LATENT = {
    "architecture": DEEPSEEK2,
    "latent": LatentWidths(latent=16, key=24, value=16),
    "head_dim": 24,
    "head_count_kv": 1,
    "rope_dimension_count": 8,
    "absent": frozenset(
        (
            *(Role.QUERY_DOWN, Role.QUERY_DOWN_NORM, Role.QUERY_UP, Role.KEY_VALUE_UP),
            *(Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
        )
    ),
}
OTHERS = [
    dataclasses.replace(MIXTRAL, qk_norm=QkNorm.HEAD),
    dataclasses.replace(MIXTRAL, qk_norm=QkNorm.VECTOR),
    dataclasses.replace(MIXTRAL, rotary=Rotary.HALVES),
    dataclasses.replace(MIXTRAL, norm=Norm.LAYER),
    dataclasses.replace(MIXTRAL, attention_bias=AttentionBias.QUERY_KEY_VALUE),
    dataclasses.replace(MIXTRAL, sinks=Sinks.HEAD),
    dataclasses.replace(MIXTRAL, window=Window.EVERY_SECOND),
    dataclasses.replace(MIXTRAL, activation=Activation.CLAMPED),
    dataclasses.replace(MIXTRAL, expert_bias=ExpertBias.ALL),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_names_of_tensors_are_ggufs_own(architecture):
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf_name)
    for tensor in architecture.inputs + architecture.block + architecture.outputs:
        role = GGUF_ROLES[tensor.role]
        if tensor.name.startswith("post_attention_norm"):  # GLM-4.5's norm before the feed-forward
            role = gguf.MODEL_TENSOR.ATTN_POST_NORM
        if tensor.name.startswith("attn_output_norm"):  # DBRX's
            role = gguf.MODEL_TENSOR.ATTN_OUT_NORM
        assert role in gguf.MODEL_TENSORS[kind]
        layer = 7 if tensor in architecture.block else None
        kind_of_tensor = "bias" if tensor.role.name.endswith("BIAS") else "weight"
        assert (
            architecture.tensor_name(tensor.role, layer) == f"{gguf.TENSOR_NAMES[role].format(bid=7)}.{kind_of_tensor}"
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_gpu_loads_every_matrix_of_a_block(architecture):
    matrices = {tensor.role for tensor in architecture.block} - FLOATS - {*EXPERTS}
    assert matrices <= {role for roles in dense_weights._TOGETHER for role in roles}


def test_a_role_without_a_tensor_there_is_refused():
    with pytest.raises(KeyError, match="Mixtral has no tensor in the role QUERY"):
        MIXTRAL.tensor_name(Role.QUERY)


def test_the_demo_and_a_converted_checkpoint_hold_exactly_the_declared_tensors(tmp_path):
    convert(TINY, tmp_path / "tiny.gguf")
    for path in (DEMO_MODEL, tmp_path / "tiny.gguf"):
        model_file = ModelFile.open(path)
        declared = model_file.config.tensors(tied=model_file.tied)
        shapes = {name: model_file.config.shape(tensor) for name, tensor in declared.items()}
        written = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in gguf.GGUFReader(path).tensors}
        assert shapes == written
        assert list(shapes) == list(written)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: first_unknown(other, [MIXTRAL]))
def test_a_part_that_a_path_does_not_know_is_never_run(other, monkeypatch):
    config = ModelFile.open(DEMO_MODEL).config
    assert first_unknown(MIXTRAL, [MIXTRAL]) is None
    assert first_unknown(other, [MIXTRAL, other]) is None
    part = first_unknown(other, [MIXTRAL])
    assert part in {f"{field.name}: {getattr(other, field.name)}" for field in dataclasses.fields(Architecture)}
    monkeypatch.setattr(transformer, "_RUNS", (MIXTRAL,))
    monkeypatch.setattr(cpu_loader, "_DECODES", (MIXTRAL,))
    with pytest.raises(FileFormatError, match=f"Mixtral has {part}, which does not run"):
        Transformer(dataclasses.replace(config, architecture=other), {}, None, None)
    assert can_decode(config, {BF16})
    assert not can_decode(dataclasses.replace(config, architecture=other), {BF16})


def test_the_compiled_step_takes_scaled_frequencies_and_queries_that_are_scaled_as_a_whole():
    config = ModelFile.open(DEMO_MODEL).config
    assert can_decode(dataclasses.replace(config, rope_scaling=RopeScaling(RopeKind.LINEAR, 4.0)), {BF16})
    yarn = dataclasses.replace(config, rope_scaling=RopeScaling(RopeKind.YARN, 4.0, 256, attention_factor=1.2))
    assert can_decode(yarn, {BF16})
    assert not can_decode(dataclasses.replace(yarn, rope_dimension_count=config.head_dim // 2), {BF16})


def test_the_compiled_step_takes_one_format_that_its_kernels_read():
    config = ModelFile.open(DEMO_MODEL).config
    assert can_decode(config, {F16})
    assert not can_decode(config, {BF16, F16})
    assert not can_decode(config, {dataclasses.replace(BF16, name="q8_0", block_length=32, block_bytes=34)})


def test_captured_graphs_take_the_formats_that_a_gpu_reads():
    assert decoder.can_decode({BF16, F16, MXFP4})
    assert not decoder.can_decode({BF16, dataclasses.replace(BF16, name="q3_x")})


def test_a_model_of_unknown_parts_runs_without_the_compiled_step(monkeypatch):
    ids = [1, 5, 9]
    compiled = fiddler.load(DEMO_MODEL, precision="exact", device="cpu")
    monkeypatch.setattr("fiddler.cpu.loader._DECODES", OTHERS[:1])
    engine = fiddler.load(DEMO_MODEL, precision="exact", device="cpu")
    assert compiled.runner._decoder is not None
    assert engine.runner._decoder is None
    torch.testing.assert_close(engine.logits(ids), compiled.logits(ids))


def test_the_dense_span_surrounds_all_of_a_block_but_its_experts():
    config = Config(MIXTRAL, 16, 32, 8, 3, 12, 2, 1, 4, 4, 2, 1e-5, 1e4)
    torch.manual_seed(0)
    weights = {name: torch.randn(config.shape(tensor)) for name, tensor in config.tensors(tied=False).items()}
    events = []

    class Linears:
        def __call__(self, x, name, onto=None):
            events.append(name)
            y = F.linear(x, weights[name])
            return y if onto is None else y + onto

        def together(self, x, names):
            return [self(x, name) for name in names]

    class OwnValues:
        """A cache in which each position attends to itself only."""

        def attend(self, layer, q, k, v, sinks):
            return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    @contextmanager
    def dense_span():
        events.append("dense")
        yield
        events.append("end")

    def experts(layer, x, expert_ids, routing_weights):
        events.append("experts")
        return x

    model = Transformer(config, weights, Linears(), experts, dense_span=dense_span)
    model(torch.tensor([3, 1]), OwnValues())
    names = [[MIXTRAL.tensor_name(role, layer) for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT)]
             for layer in range(3)]  # fmt: skip
    assert events == [event for block in names for event in ("dense", *block, "end", "experts")]

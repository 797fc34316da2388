"""Quantised weights with the CPU on both sides: experts against float64, whole models against the CPU's runner."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch

import fiddler
from fiddler.cost_curve import Curve
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import ExpertMatrices
from fiddler.offload.gpu_side import prompt_decode_bytes
from fiddler.offload.plan import Costs
from fiddler.offload.staging_ring import SLOTS, slot_rows
from fiddler.telemetry.recorder import SILENT, Meter
from oracles.both_sides import EXACT, MAX_TOKENS, compute_layer, orchestrator
from oracles.both_sides_runner import runner_of_both_sides
from oracles.quantised import write_quantised
from oracles.quantised_layers import experts_in_float64, quantised_layer
from oracles.synthetic import write_random_mixtral

E, F, D = 4, 768, 256
COSTS = {
    "CPU alone": Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), inf, 0.0),
    "streamed": Costs(Curve((1,), (1e6,)), Curve((1,), (0.0,)), 1.0, 0.0),
    "split": Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0),
}
MIXTURES = {  # of gate, up and down
    "Q8_0": ("q8_0", "q8_0", "q8_0"),
    "Q4_K_M": ("q4_k", "q4_k", "q6_k"),
    "uneven": ("q5_k", "mxfp4", "iq4_nl"),
}
PLACED = [[0], [], [1]]


def layers_of(mixture, activations):
    return [quantised_layer(MIXTURES[mixture], activations, (E, F, D), seed) for seed in range(len(PLACED))]


def step(rng, tokens, k=2):
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    expert_ids = np.array([rng.permutation(E)[:k] for _ in range(tokens)], np.int64)
    return x, expert_ids, rng.random((tokens, k)).astype(np.float32)


@pytest.mark.parametrize("activations,bound", [("f32", 1e-6), ("q8", 2e-2)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_plan_of_quantised_experts_matches_float64(mixture, activations, bound):
    layers, rng = layers_of(mixture, activations), np.random.default_rng(0)
    for costs in COSTS.values():
        for rows in (256, 2 * F):  # of a slot: a part of an expert, and two
            experts = orchestrator(layers, PLACED, costs, rows=rows)
            for layer, tokens in ((0, 1), (2, 7), (1, MAX_TOKENS + 3)):
                inputs = step(rng, tokens)
                output = compute_layer(experts, layer, *inputs)
                expected = experts_in_float64(layers[layer], *inputs)
                assert np.linalg.norm(output - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_are_split_after_whole_blocks_of_down(mixture):
    layers = layers_of(mixture, "f32")
    experts, block, splits = orchestrator(layers, PLACED, COSTS["split"], rows=256), layers[0].split_rows, 0
    for tokens in range(1, 40):
        split = experts.split(1, np.array([tokens, 3, 1, 0]))
        for e, rows in split.gpu_rows.items():
            assert rows + split.cpu_rows[e] == F
            assert rows % block == 0
            splits += 0 < rows < F
    assert splits > 0


def test_streamed_experts_are_copied_as_they_are_stored():
    """Their bytes are counted from the formats, and an expert's are those of its three matrices."""
    layers, meter = layers_of("Q4_K_M", "f32"), Meter()
    assert layers[0].expert_bytes == 2 * F * D * 144 // 256 + F * D * 210 // 256
    experts = orchestrator(layers, [[], [], []], COSTS["streamed"], rows=F, recorder=meter)
    inputs = step(np.random.default_rng(0), 1)
    compute_layer(experts, 0, *inputs)
    assert meter.nbytes["copy"] == 2 * layers[0].expert_bytes
    assert experts.residents.table.shape == (len(PLACED), E, 6)
    placed = orchestrator(layers, PLACED, COSTS["streamed"], rows=F)
    assert placed.residents.nbytes(0, 0) == layers[0].expert_bytes  # each matrix ends at a multiple of 16 here


def test_a_slot_of_large_quantised_experts_is_whole_blocks():
    """An expert of 1 MiB is small: a slot holds several; a large one is cut after whole blocks of down."""
    (layer, *_) = layers_of("Q4_K_M", "f32")
    assert slot_rows([layer]) % F == 0
    kinds, shapes = layer.matrix_formats, ((1, 256 * 160, 1024), (1, 256 * 160, 1024), (1, 1024, 256 * 160))
    stacks = (np.zeros(kind.stored_shape(shape), np.uint8) for kind, shape in zip(kinds, shapes, strict=True))
    large = ExpertWeights(*map(ExpertMatrices.of, stacks), layer.variant, layer.others)
    assert large.expert_bytes > 64 << 20
    assert slot_rows([large]) % 256 == 0
    assert SLOTS * slot_rows([large]) >= 256 * 160


RULES = {
    "Q8_0": {"": "q8_0"},
    "Q4_K_M": {"ffn_down_exps": "q6_k", "_exps": "q4_k", "attn_k": "q8_0", "attn_v": "q8_0", "attn_output": "q5_k",
               "attn_q.": "q4_k", "token_embd": "q4_k", "output.": "q6_k"},
    "MXFP4": {"_exps": "mxfp4", "": "iq4_xs"},
    "5 bits": {"ffn_down_exps": "q5_1", "_exps": "q5_0", "attn": "q4_1", "": "q4_0"},
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_exact_logits_of_quantised_models_match_those_of_the_cpu(name, tmp_path):
    source = write_random_mixtral(tmp_path / "bf16.gguf", d=256, f=512, seed=4)

    def kind_of(tensor):
        plain = "norm" in tensor or "gate_inp" in tensor
        return None if plain else next(kind for part, kind in RULES[name].items() if part in tensor)

    path, ids = write_quantised(source, tmp_path / "q.gguf", kind_of), [1, *range(3, 500, 11)]
    engine = fiddler.load(path, device="cpu", precision="exact")
    expected = engine.logits(ids)
    for placed in ([[0], [2, 1]], [[], []]):
        runner = runner_of_both_sides(path, SILENT, placed, rows=256)
        sequence = runner.sequence()
        logits = runner.step([(sequence, ids[:30])], wanted=range(30)).logits
        by_token = [runner.step([(sequence, [token])]).logits for token in ids[30:]]
        assert (torch.cat([logits, *by_token]) - expected).norm() <= 1e-4 * expected.norm()


def test_memory_for_decoded_experts_is_a_small_part_of_what_is_left_for_experts():
    quantised, plain = layers_of("Q4_K_M", "q8"), EXACT
    assert prompt_decode_bytes(quantised, (15 << 30) - 1, exact=False) == 64 << 20
    assert prompt_decode_bytes(quantised, 15 << 30, exact=False) == 384 << 20
    assert prompt_decode_bytes(quantised, 1 << 40, exact=True) == prompt_decode_bytes(plain, 1 << 40, exact=False) == 0

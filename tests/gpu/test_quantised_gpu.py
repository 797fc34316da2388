"""Quantised weights on the GPU: kernels against float64 and `gguf`, models against the CPU. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.kernels.formats import GPU_FORMATS
from fiddler.loading import load
from oracles.quantised import write_quantised
from oracles.synthetic import write_random_mixtral

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")

from oracles import block_kernel_checks as checks, int8_kernel_checks

DEVICE = "cuda"
MIXTURES = [("q8_0",) * 3, ("q4_k", "q4_k", "q6_k"), ("q5_k", "mxfp4", "iq4_nl"), ("q4_0", "iq4_xs", "q5_1")]
LARGE = (3, 2048, 1024)
IDS = [1, *range(3, 500, 11)]
Q4_K_M = {"ffn_down_exps": "q6_k", "_exps": "q4_k", "attn_k": "q8_0", "attn_v": "q8_0", "attn_output": "q5_k"}
Q4_K_M |= {"attn_q.": "q4_k", "token_embd": "q4_k", "output.": "q6_k"}
RULES = {"Q8_0": {"": "q8_0"}, "Q4_K_M": Q4_K_M, "MXFP4": {"_exps": "mxfp4", "": "iq4_xs"}}
RULES |= {"5 bits": {"ffn_down_exps": "q5_1", "_exps": "q5_0", "attn": "q4_1", "": "q4_0"}}
WAYS = {
    "GPU": {},
    "GPU and CPU": {"gpu_experts": 5},
    "streamed": {"gpu_experts": 5, "missing": "stream"},
    "no residents": {"gpu_experts": 0},
}


@pytest.mark.parametrize("kind", sorted(GPU_FORMATS))
def test_blocks_decode_to_the_bits_that_gguf_computes_and_gemv_matches_float64(kind):
    checks.check_decoder(kind, DEVICE, rows=64, columns=4096)
    for rows, columns in ((7, 768), (300, 4096), (33, 256)):
        checks.check_gemv(kind, DEVICE, rows, columns)


@pytest.mark.parametrize("kinds", MIXTURES)
def test_quantised_experts_match_float64(kinds):
    for shape in ((3, 512, 256), LARGE):
        checks.check_experts_of_one(kinds, DEVICE, shape)
        for tokens in (3, 60, 200):
            for decoded_bytes in (0, 2 << 20):
                checks.check_experts_of_many(kinds, DEVICE, torch.bfloat16, tokens, shape, decoded_bytes=decoded_bytes)


def test_activations_are_rounded_to_int8_as_numpy_does():
    int8_kernel_checks.check_rounding(DEVICE)
    int8_kernel_checks.check_hidden(DEVICE)


def test_a_models_products_are_of_int8_in_fast_alone():
    int8_kernel_checks.check_linear(DEVICE)


@pytest.mark.parametrize("kind", sorted(GPU_FORMATS))
def test_products_of_int8_match_float64(kind):
    for rows, columns in ((7, 768), (300, 4096), (33, 14336)):
        int8_kernel_checks.check_gemv(kind, DEVICE, rows, columns)


@pytest.mark.parametrize("kinds", [*MIXTURES, ("q4_0", "q5_0", "q4_1")])
def test_experts_with_activations_in_int8_match_float64(kinds):
    for shape in ((3, 512, 256), LARGE):
        int8_kernel_checks.check_experts(kinds, DEVICE, shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("source") / "bf16.gguf", d=256, f=512, seed=4)


def check(logits, expected, precision):
    """exact: all close. fast: a quarter of the positions, since a router may choose another expert in others."""
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    if precision == "exact":
        assert errors.max() <= 1e-4
    else:
        assert errors.quantile(0.25) <= 3e-2


def by_token(engine, ids):
    """Logits of each of the ids, one a step."""
    sequence = engine.runner.sequence()
    return torch.cat([engine.runner.step([(sequence, [token])]).logits for token in ids])


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", RULES)
def test_logits_of_quantised_models_match_those_of_the_cpu(source, tmp_path, name, precision):
    def kind_of(tensor):
        plain = "norm" in tensor or "gate_inp" in tensor
        return None if plain else next(kind for part, kind in RULES[name].items() if part in tensor)

    path = write_quantised(source, tmp_path / "q.gguf", kind_of)
    expected = load(path, "cpu", precision="exact").logits(IDS)
    of_cpu = by_token(load(path, "cpu", precision=precision), IDS)
    for options in WAYS.values():
        engine = load(path, "cuda", precision=precision, **options)
        assert engine.runner._decoder is not None
        check(engine.logits(IDS), expected, precision)
        if precision == "exact":
            sequence = engine.runner.sequence()
            engine.runner.prefill(sequence, IDS[:30])
            steps = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in IDS[30:]])
            check(steps, expected[30:], precision)
        else:  # single tokens are rounded to int8 on both
            steps = by_token(engine, IDS)
            check(steps, of_cpu, precision)
            errors, errors_of_cpu = ((each - expected).norm(dim=1).median() for each in (steps, of_cpu))
            assert errors <= 1.5 * errors_of_cpu


def test_residents_take_the_bytes_of_their_format(source, tmp_path):
    path = write_quantised(source, tmp_path / "q.gguf", lambda name: "q4_k" if "_exps" in name else None)
    engines = [load(each, "cuda", precision="exact") for each in (source, path)]
    whole, quantised = (engine.runner.orchestrator.residents.nbytes(0, 0) for engine in engines)
    assert whole * 144 == quantised * 512
    greedy = fiddler.Sampling(temperature=0.0)
    assert len(engines[1].generate("Once", greedy, 8).tokens) == 8

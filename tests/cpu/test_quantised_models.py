"""Models with quantised weights on the CPU: logits against transformers on the weights that `gguf` dequantises."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.files.model_file import ModelFile
from fiddler.kernels.formats import BLOCK_FORMATS
from oracles.command import fails_in_one_line, run
from oracles.quantised import write_quantised
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

IDS = [1, *range(3, 500, 11)]

# a Mixtral's Q4_K_M as llama-quantize makes it
Q4_K_M = {"ffn_down_exps": "q6_k", "_exps": "q4_k", "attn_k": "q8_0", "attn_v": "q8_0", "attn_output": "q5_k"}
Q4_K_M |= {"attn_q.": "q4_k", "token_embd": "q4_k", "output.": "q6_k"}
STRANGE = {"ffn_gate_exps": "bf16", "ffn_up_exps": "q2_k", "ffn_down_exps": "f32", "attn_k": "f16", "attn_q.": "mxfp4"}
STRANGE |= {"attn_v": "iq4_nl", "token_embd": "q3_k", "output.": "iq4_xs"}


def kinds(rules):
    return lambda name: next((kind for part, kind in rules.items() if part in name and "norm" not in name), None)


def everywhere(kind):
    return lambda name: None if "norm" in name or "gate_inp" in name else kind


def compare(path, precision):
    """Relative error of each position's logits, and in how many the most likely token is another."""
    engine = fiddler.load(path, precision=precision)
    logits = engine.logits(IDS)
    with torch.inference_mode():
        expected = from_gguf(path)(torch.tensor([IDS]), use_cache=False).logits[0]
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return engine, errors, (logits.argmax(-1) != expected.argmax(-1)).sum()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """D = 256, F = 512, in bf16."""
    return write_random_mixtral(tmp_path_factory.mktemp("source") / "bf16.gguf", d=256, f=512, seed=4)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_exact_logits_of_a_quantised_model_match_transformers(source, tmp_path, kind):
    path = write_quantised(source, tmp_path / "q.gguf", everywhere(kind))
    _, errors, different = compare(path, "exact")
    assert errors.max() < 1e-4
    assert different == 0


@pytest.mark.parametrize("rules", [Q4_K_M, STRANGE], ids=["Q4_K_M", "strange"])
def test_exact_logits_of_mixed_types_match_transformers(source, tmp_path, rules):
    path = write_quantised(source, tmp_path / "q.gguf", kinds(rules))
    _, errors, different = compare(path, "exact")
    assert errors.max() < 1e-4
    assert different == 0


def test_a_quantised_model_generates_and_its_speed_is_measured(source, tmp_path):
    """The compiled decode step runs it, and counts its bytes as the file has them."""
    path = write_quantised(source, tmp_path / "q.gguf", kinds(Q4_K_M))
    engine = fiddler.load(path, device="cpu")
    assert len(engine.generate("Once", fiddler.Sampling(temperature=0.0), 8).tokens) == 8
    done = run("bench", path, "--device", "cpu", "-p", "16", "-n", "4", "-r", "1")
    assert done.returncode == 0, done.stderr


def test_a_type_that_no_gpu_decodes_is_refused_for_one_by_name(source, tmp_path):
    path = write_quantised(source, tmp_path / "q.gguf", kinds(STRANGE))
    fails_in_one_line(run("run", path, "--device", "cuda", "-p", "x"), "weights run on the CPU only; use --device cpu")
    plain = {"ffn_gate_exps": "bf16", "_exps": "q4_k"}
    path = write_quantised(source, tmp_path / "mixed.gguf", kinds(plain))
    assert ModelFile.open(path).gpu_obstacle == "the experts of layer 0 mix BF16 and Q4_K, which run on the CPU only"
    for kind in BLOCK_FORMATS:
        path = write_quantised(source, tmp_path / f"{kind}.gguf", kinds({"attn_q.": kind}))
        expected = f"{kind.upper()} weights run on the CPU only" if kind in ("q2_k", "q3_k") else None
        assert ModelFile.open(path).gpu_obstacle == expected

"""Models without experts from end to end: logits in every precision and type, and what has no meaning for them."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch

import fiddler
from fiddler import kernels
from fiddler.evaluation.kernel_throughput import kernel_rows
from fiddler.files.inspection import describe, to_text
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.models import LLAMA
from fiddler.models.config import Config
from fiddler.offload.cost_benchmark import calibrate_alone
from fiddler.telemetry.recorder import Meter
from oracles.command import fails_in_one_line, run
from oracles.families import CASES, FamilyReference, make_family_checkpoint
from tools.random_model import write_random_model

EXACT, FAST = 1e-4, 1.5e-2  # relative L2 error of a sequence's logits
DENSE = [name for name, case in CASES.items() if case.kind in ("Llama", "Mistral")]
CONFIG = Config(LLAMA, 4096, 64, 40, 3, 0, 4, 2, 10, 0, 0, 1e-5, 1e4, feed_forward_length=56,
                leading_dense_block_count=3)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model.gguf"
    write_random_model(path, CONFIG, DEMO_MODEL)
    return path


@pytest.mark.parametrize("name", DENSE)
def test_fast_logits_are_those_of_transformers_but_for_roundings(name, tmp_path):
    """Also token by token, which the compiled step takes."""
    folder = make_family_checkpoint(CASES[name], tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    reference, engine = FamilyReference(folder), fiddler.load(tmp_path / "model.gguf", device="cpu")
    assert engine.runner._decoder is not None
    for length in (1, 40, 100):
        ids = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        expected, sequence = reference(ids), engine.runner.sequence()
        by_token = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in ids])
        for logits in (engine.logits(ids), by_token):
            assert torch.linalg.norm(logits - expected) < FAST * torch.linalg.norm(expected)


def test_a_file_of_float32_weights_computes_what_its_16_bit_copy_computes(tmp_path):
    write_random_model(tmp_path / "f32.gguf", CONFIG, DEMO_MODEL, "f32")
    report = fiddler.convert(tmp_path / "f32.gguf", tmp_path / "f16.gguf", "f16")
    engine, rounded = (fiddler.load(tmp_path / name, device="cpu") for name in ("f32.gguf", "f16.gguf"))
    expected, logits = engine.logits([5, 6, 7]), rounded.logits([5, 6, 7])
    assert torch.linalg.norm(logits - expected) < 1e-2 * torch.linalg.norm(expected)
    assert report.tensors == len(engine.model_file.file.tensors)


def test_converting_a_dense_gguf_keeps_every_bit(path, tmp_path):
    fiddler.convert(path, tmp_path / "copy.gguf")
    ours, theirs = gguf.GGUFReader(tmp_path / "copy.gguf"), gguf.GGUFReader(path)
    assert {t.name: t.data.tobytes() for t in ours.tensors} == {t.name: t.data.tobytes() for t in theirs.tensors}
    assert "llama.expert_count" not in ours.fields


def test_many_prompts_at_once_give_the_texts_of_each_alone(path):
    engine = fiddler.load(path, device="cpu", precision="exact")
    prompts, greedy = [f"Number {n} is" for n in range(11)], fiddler.Sampling(temperature=0.0)
    together = dict(engine.batch(prompts, greedy, 6))
    assert [together[n].text for n in range(11)] == [engine.generate(prompt, greedy, 6).text for prompt in prompts]


def test_all_weights_that_a_step_reads_are_dense(path):
    meter = Meter()
    engine = fiddler.load(path, device="cpu", recorder=meter)
    weights = sum(t.nbytes for t in engine.model_file.file.tensors.values() if t.type == "BF16")
    table = 2 * engine.config.vocab_size * engine.config.embedding_length
    for tokens in ([5], [5, 6, 7]):
        meter.clear()
        engine.runner.prefill(engine.runner.sequence(), tokens)
        assert meter.nbytes["experts"] == 0
        assert meter.nbytes["dense"] == weights - table  # all but the embeddings


def test_what_is_about_experts_says_in_one_line_that_there_are_none(path, tmp_path):
    model_file = ModelFile.open(path)
    with pytest.raises(fiddler.FiddlerError, match="has no experts, so there is nothing to calibrate"):
        calibrate_alone(model_file, "cpu", None, exact=False, notify=print)
    with pytest.raises(fiddler.FiddlerError, match="has no experts; --kernels measures them: leave it out"):
        next(kernel_rows(model_file, [kernels.choose_tier()], ["bf16"], [1], 1))
    (tmp_path / "text").write_text("Once upon a time there was a small boat. " * 9)
    counts = tmp_path / "counts.json"
    done = run("perplexity", path, "-f", tmp_path / "text", "-c", "16", "--expert-counts", counts)
    fails_in_one_line(done, f"--expert-counts {counts}: {path} has no experts; leave it out")
    assert not counts.exists()


def test_options_about_experts_are_a_warning(path):
    lines = []
    fiddler.load(path, device="cpu", gpu_experts=3, expert_counts="no such file.json", notify=lines.append)
    assert [line for line in lines if "the model has no experts" in line] == lines[:1]


def test_inspect_says_that_every_layer_is_dense(path):
    described = describe(path)
    text = to_text(described)
    assert "3 layers of width 40, no experts" in text
    assert "every layer dense, of width 56" in text
    assert described["runnable"] is True
    assert described["architecture"]["parts"]["router"] == "none"
    assert described["architecture"]["parts"]["dense_layers"] == "every layer"
    assert described["bytes"]["experts"] == described["bytes"]["one_expert"] == 0


def test_a_config_of_a_dense_model_has_no_sparse_layer_and_no_numbers_of_experts():
    assert list(CONFIG.sparse_layers) == []
    for name in ("expert_count", "expert_used_count", "expert_feed_forward_length"):
        with pytest.raises(fiddler.FiddlerError, match=f"{name} is 1; a Llama or Mistral has no experts"):
            replace(CONFIG, **{name: 1})
    with pytest.raises(fiddler.FiddlerError, match="leading_dense_block_count is 2; it must lie between 3 and 3"):
        replace(CONFIG, leading_dense_block_count=2)

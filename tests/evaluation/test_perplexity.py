"""Perplexity and expert counts against transformers', computed the same way; and `fiddler perplexity`."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler.errors import FileFormatError, RequestError
from fiddler.evaluation.perplexity import Estimate, cut, losses, measure
from fiddler.loading import DEMO_MODEL
from fiddler.telemetry.expert_counts import ExpertCounts, read_counts
from oracles.both_sides_runner import runner_of_both_sides
from oracles.permissions import permissions_count_for_ever
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

HELDOUT = Path(__file__).parents[1] / "data" / "heldout.txt"  # not in the demo model's training text
IDS = np.random.default_rng(8).integers(3, 512, 700).tolist()


@pytest.fixture(scope="module")
def reference():
    return from_gguf(DEMO_MODEL)


@pytest.fixture(scope="module")
def demo():
    return {precision: fiddler.load(device="cpu", precision=precision) for precision in ("exact", "fast")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("perplexity") / "tiny.gguf", experts=5, used=3)


@pytest.fixture(scope="module")
def engine(path):
    return fiddler.load(path, device="cpu", precision="exact")


def reference_losses(model, ids, context, bos):
    """transformers' negative log-likelihoods of the tokens after the middle of each whole window, [W, n]."""
    rows = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    inputs = rows.clone()
    inputs[:, 0] = bos
    with torch.inference_mode():
        logits = torch.cat([model(row).logits for row in inputs.split(1)])
    scored, targets = logits[:, context // 2 : -1], rows[:, context // 2 + 1 :]
    nll = F.cross_entropy(scored.flatten(0, 1).double(), targets.flatten(), reduction="none")
    return nll.view(targets.shape).numpy()


# 256 tokens: two windows in a step of 512; 33: 15 in a step and 5 in the last one; 1024: two steps a window
@pytest.mark.parametrize("context, windows", [(256, 5), (33, 20), (1024, 2)])
def test_perplexity_after_each_window_is_that_of_transformers(demo, reference, context, windows):
    tokenizer = demo["exact"].tokenizer
    ids = tokenizer.encode(HELDOUT.read_text()[:20000], add_bos=True)[: context * windows + context // 2]
    expected = reference_losses(reference, ids, context, tokenizer.bos_id)
    for precision, bound in (("exact", 1e-5), ("fast", 0.005)):
        estimates = list(measure(demo[precision].runner, cut(ids, context), tokenizer.bos_id))
        assert [estimate.windows for estimate in estimates] == list(range(1, windows + 1))
        assert estimates[-1].tokens == expected.size == windows * (context - context // 2 - 1)
        assert estimates[-1].perplexity == pytest.approx(math.exp(expected.mean()), rel=bound)
        for count, estimate in enumerate(estimates if precision == "exact" else [], start=1):
            assert estimate.perplexity == pytest.approx(math.exp(expected[:count].mean()), rel=bound)
        error = math.exp(expected.mean()) * expected.std(ddof=1) / expected.size**0.5
        assert estimates[-1].standard_error == pytest.approx(error, rel=2 * bound)


def test_without_a_bos_token_a_window_begins_with_its_own_first_token(engine, path):
    expected = reference_losses(from_gguf(path), IDS, 50, torch.tensor(IDS[:700:50]))
    *_, estimate = measure(engine.runner, cut(IDS, 50), None)
    assert estimate.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def chosen_by_transformers(path, windows, bos):
    """How often each expert is among the first K of its router's logits, [L, E]."""
    model = from_gguf(path)
    with torch.inference_mode():
        logits = [model(torch.tensor([[bos, *row[1:]]]), output_router_logits=True).router_logits for row in windows]
    k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    return [
        torch.bincount(torch.cat(layer).topk(k).indices.flatten(), minlength=experts).tolist()
        for layer in zip(*logits, strict=True)
    ]


@pytest.mark.parametrize("executors", ["the CPU", "both sides"])
def test_expert_counts_are_those_of_transformers_routers(path, engine, executors):
    """All tokens of the windows count, scored or not, wherever the experts are computed."""
    recorder, bos, windows = ExpertCounts(2, 5), engine.tokenizer.bos_id, cut(IDS, 90)
    if executors == "both sides":
        # 100: fewer tokens than a step has, so that the orchestrator computes it in pieces
        runner = runner_of_both_sides(path, recorder, [[0, 2], [1]], max_tokens=100)
    else:
        runner = fiddler.load(path, device="cpu", precision="exact", recorder=recorder).runner
    *_, estimate = measure(runner, windows, bos)
    *_, cpu_estimate = measure(engine.runner, windows, bos)
    assert estimate.perplexity == pytest.approx(cpu_estimate.perplexity, rel=1e-5)
    assert recorder.counts == chosen_by_transformers(path, windows, bos)
    assert {sum(row) for row in recorder.counts} == {90 * 7 * 3}


def test_losses_of_large_logits_are_those_of_float64():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)) * 20
    logits[0, 5], logits[1, 5] = 3e38, -3e38
    targets = [5, 5, 0, 299, 17, 17, 1]
    expected = F.cross_entropy(logits.double(), torch.tensor(targets), reduction="none").numpy()
    np.testing.assert_allclose(losses(logits, targets), expected, rtol=1e-12, atol=1e-12)


def test_an_estimate_from_windows_is_that_of_all_their_losses_together():
    windows = [np.random.default_rng(seed).gamma(2.0, 1.5, 40 + seed) for seed in range(5)]
    estimate, together = Estimate(), np.concatenate(windows)
    for window in windows:
        estimate = estimate.plus(window)
    assert (estimate.windows, estimate.tokens) == (5, together.size)
    assert estimate.perplexity == pytest.approx(np.exp(together.mean()), rel=1e-12)
    error = np.exp(together.mean()) * together.std(ddof=1) / together.size**0.5
    assert estimate.standard_error == pytest.approx(error, rel=1e-9)
    assert Estimate().plus(np.array([1.0])).standard_error == 0
    assert Estimate().plus(np.array([800.0])).perplexity == math.inf


def test_a_text_is_cut_into_whole_windows_and_must_hold_two():
    assert cut(range(10), 5) == [range(5), range(5, 10)]
    assert cut(range(14), 5) == [range(5), range(5, 10)]
    assert cut(range(15), 5)[2] == range(10, 15)
    with pytest.raises(RequestError, match="the text has 9 tokens; windows of 5 need at least 10"):
        cut(range(9), 5)


# --- the command ------------------------------------------------------------------------------------------------


def run(*arguments):
    """The command, which root may not write every folder with."""
    command = [sys.executable, "-m", "fiddler", "perplexity", *map(str, arguments)]
    options = {"capture_output": True, "stdin": subprocess.DEVNULL, "preexec_fn": permissions_count_for_ever}
    return subprocess.run(command, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file that is not UTF-8; the last newline is the editor's, not the text's."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(HELDOUT.read_bytes()[:1500] + "Café".encode("latin-1") + b"\n\n")
    return path


def test_the_command_prints_the_estimate_and_writes_the_expert_counts_of_python(path, engine, text, tmp_path):
    counts = tmp_path / "counts.json"
    done = run(path, "-f", text, "-c", 60, "--precision", "exact", "--device", "cpu", "--expert-counts", counts)
    assert done.returncode == 0, done.stderr
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text.read_bytes()[:-1], add_bos=True)
    recorder = ExpertCounts(2, 5)
    counted = fiddler.load(path, device="cpu", precision="exact", recorder=recorder)
    *_, expected = measure(counted.runner, cut(ids, 60), tokenizer.bos_id)
    expected_line = f"Final estimate: PPL = {expected.perplexity:.4f} +/- {expected.standard_error:.5f}\n"
    assert done.stdout.decode() == expected_line
    assert re.search(
        rf"\| {expected.tokens} tokens scored in {expected.windows} windows of 60 \|", done.stderr.decode()
    )
    assert done.stderr.count(b"\n") == 1
    assert read_counts(counts, 2, 5) == recorder.counts
    assert list(tmp_path.iterdir()) == [counts]
    counts.write_text('{"counts": [[1, 1, 1, 1, 1], [2, 2, 2, 2, 2]]}')  # counts of the same model are replaced
    done = run(
        path, "-f", text, "-c", 60, "--precision", "exact", "--device", "cpu", "--expert-counts", counts, "--json"
    )
    answer = json.loads(done.stdout)
    assert read_counts(counts, 2, 5) == recorder.counts
    assert answer["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert answer["standard_error"] == pytest.approx(expected.standard_error, rel=1e-9)
    fields = {key: answer[key] for key in ("tokens_scored", "windows", "context", "model", "file", "precision")}
    assert fields == {
        "tokens_scored": expected.tokens,
        "windows": expected.windows,
        "context": 60,
        "model": str(path),
        "file": str(text),
        "precision": "exact",
    }
    assert answer["seconds"] > 0


def test_wrong_texts_windows_and_count_files_are_refused_before_any_computation(path, text, tmp_path):
    """One line each, before anything is computed."""
    (tmp_path / "empty").touch()
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "other.json").write_text('{"counts": [[1]]}')
    refusals = {
        "none.txt: cannot be read": [path, "-f", tmp_path / "none.txt"],
        "cannot be read": [path, "-f", tmp_path],
        "none.gguf": [tmp_path / "none.gguf", "-f", text],
        "empty: the text has 1 tokens; windows of 512 need at least 1024": [path, "-f", tmp_path / "empty"],
        "--ctx 1025: the model was trained with 1024": [path, "-f", text, "-c", 1025],
        "notes exists and is no file of this model's": [path, "-f", text, "--expert-counts", tmp_path / "notes"],
        "other.json exists and is no": [path, "-f", text, "--expert-counts", tmp_path / "other.json"],
        "is a directory": [path, "-f", text, "--expert-counts", tmp_path],
        "is not a directory": [path, "-f", text, "--expert-counts", tmp_path / "none" / "counts.json"],
    }
    (tmp_path / "locked").mkdir(mode=0o500)
    refusals["cannot be written in"] = [path, "-f", text, "--expert-counts", tmp_path / "locked" / "counts.json"]
    for message, arguments in refusals.items():
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, b"")
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr.decode())
        assert message in done.stderr.decode()
    for arguments in ([path], [path, "-f", text, "-c", 2], [path, "-f", text, "-c", "many"]):
        assert run(*arguments).returncode == 2
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_model_that_computes_nan_is_an_error_that_names_the_window(tmp_path):
    path = write_random_mixtral(tmp_path / "damaged.gguf", layers=1)
    norm = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(FileFormatError, match="no number in window 1: "):
        next(measure(fiddler.load(path, device="cpu").runner, cut(IDS, 50), 1))

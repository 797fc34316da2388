"""Perplexity and expert counts: transformers' own, computed the same way; and the command."""

from __future__ import annotations

import json
import math
import os
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
from fiddler import kernels
from fiddler.device.weight_copy import HostCopy
from fiddler.errors import FileFormatError, RequestError
from fiddler.evaluation.perplexity import Estimate, cut, losses, measure
from fiddler.files.weights import mapped_experts
from fiddler.loading import DEMO_MODEL
from fiddler.offload.expert_cache import Residents
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs, Curve
from fiddler.offload.staging_ring import Ring
from fiddler.telemetry.expert_counts import counting, read_counts
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

HELDOUT = Path(__file__).parents[1] / "data" / "heldout.txt"  # not in the demo model's training text
IDS = np.random.default_rng(8).integers(3, 512, 700).tolist()


@pytest.fixture(scope="module")
def theirs():
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
    """transformers' negative log-likelihoods of the tokens behind the middle of each whole window, [W, n]."""
    rows = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    given = rows.clone()
    given[:, 0] = bos
    with torch.inference_mode():
        logits = torch.cat([model(some).logits for some in given.split(1)])
    asked, answers = logits[:, context // 2 : -1], rows[:, context // 2 + 1 :]
    found = F.cross_entropy(asked.flatten(0, 1).double(), answers.flatten(), reduction="none")
    return found.view(answers.shape).numpy()


# tokens a window: two in a step of 512; odd, 15 in a step and 5 in the last one; two steps a window
@pytest.mark.parametrize("context, windows", [(256, 5), (33, 20), (1024, 2)])
def test_it_is_that_of_transformers(demo, theirs, context, windows):
    tokenizer = demo["exact"].tokenizer
    ids = tokenizer.encode(HELDOUT.read_text()[:20000], add_bos=True)[: context * windows + context // 2]
    expected = reference_losses(theirs, ids, context, tokenizer.bos_id)
    for precision, bound in (("exact", 1e-5), ("fast", 0.005)):
        made = list(measure(demo[precision].runner, cut(ids, context), tokenizer.bos_id))
        assert [estimate.windows for estimate in made] == list(range(1, windows + 1))
        assert made[-1].tokens == expected.size == windows * (context - context // 2 - 1)
        assert made[-1].perplexity == pytest.approx(math.exp(expected.mean()), rel=bound)
        for count, estimate in enumerate(made if precision == "exact" else [], start=1):
            assert estimate.perplexity == pytest.approx(math.exp(expected[:count].mean()), rel=bound)
        error = math.exp(expected.mean()) * expected.std(ddof=1) / expected.size**0.5
        assert made[-1].standard_error == pytest.approx(error, rel=2 * bound)


def test_without_a_bos_the_first_token_stays(engine, path):
    expected = reference_losses(from_gguf(path), IDS, 50, torch.tensor(IDS[:700:50]))
    *_, made = measure(engine.runner, cut(IDS, 50), None)
    assert made.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def chosen_by_transformers(path, windows, bos):
    """How often each expert is among the first K of its router's logits, [L, E]."""
    model = from_gguf(path)
    with torch.inference_mode():
        out = [model(torch.tensor([[bos, *window[1:]]]), output_router_logits=True).router_logits for window in windows]
    k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    return [
        torch.bincount(torch.cat(layer).topk(k).indices.flatten(), minlength=experts).tolist()
        for layer in zip(*out, strict=True)
    ]


@pytest.mark.parametrize("where", ["the CPU", "both sides"])
def test_counts_are_those_of_transformers_routers(path, where):
    """Of all tokens in windows, scored or not, whoever computes the experts."""
    engine = fiddler.load(path, device="cpu", precision="exact")
    model, bos, windows = engine.runner.model, engine.tokenizer.bos_id, cut(IDS, 90)
    if where == "both sides":
        layers, link = mapped_experts(engine.model_file, kernels.choose_tier(), exact=True), HostCopy()
        residents = Residents(layers, link.device)
        residents.load([[0, 2], [1]], link, lambda nbytes: None)
        costs = Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0)
        # with room for fewer tokens than a step has, so that it takes them in pieces
        model.experts = Orchestrator(layers, residents, Ring(link, layers, 64, 3), costs, 100, 1 << 20)
    plain = model.experts
    with counting(model) as counted:
        *_, made = measure(engine.runner, windows, bos)
    assert model.experts is plain
    assert counted.counts == chosen_by_transformers(path, windows, bos)
    assert {sum(row) for row in counted.counts} == {90 * 7 * 3}
    *_, again = measure(fiddler.load(path, device="cpu", precision="exact").runner, windows, bos)
    assert made.perplexity == pytest.approx(again.perplexity, rel=1e-5)


def test_losses_are_those_of_float64():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)) * 20
    logits[0, 5], logits[1, 5] = 3e38, -3e38
    following = [5, 5, 0, 299, 17, 17, 1]
    expected = F.cross_entropy(logits.double(), torch.tensor(following), reduction="none").numpy()
    np.testing.assert_allclose(losses(logits, following), expected, rtol=1e-12, atol=1e-12)


def test_an_estimate_adds_windows_up():
    parts = [np.random.default_rng(seed).gamma(2.0, 1.5, 40 + seed) for seed in range(5)]
    estimate, whole = Estimate(), np.concatenate(parts)
    for part in parts:
        estimate = estimate.plus(part)
    assert (estimate.windows, estimate.tokens) == (5, whole.size)
    assert estimate.perplexity == pytest.approx(np.exp(whole.mean()), rel=1e-12)
    error = np.exp(whole.mean()) * whole.std(ddof=1) / whole.size**0.5
    assert estimate.standard_error == pytest.approx(error, rel=1e-9)
    assert Estimate().plus(np.array([1.0])).standard_error == 0
    assert Estimate().plus(np.array([800.0])).perplexity == math.inf


def test_windows():
    assert cut(range(10), 5) == [range(5), range(5, 10)]
    assert cut(range(14), 5) == [range(5), range(5, 10)]
    assert cut(range(15), 5)[2] == range(10, 15)
    with pytest.raises(RequestError, match="the text has 9 tokens; windows of 5 need at least 10"):
        cut(range(9), 5)


# --- the command ------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, "-m", "fiddler", "perplexity", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Not UTF-8, and with one newline at the end that is the editor's."""
    made = tmp_path_factory.mktemp("text") / "text.txt"
    made.write_bytes(HELDOUT.read_bytes()[:1500] + "Café".encode("latin-1") + b"\n\n")
    return made


def test_the_command(path, engine, text, tmp_path):
    counts = tmp_path / "counts.json"
    done = run(path, "-f", text, "-c", 60, "--precision", "exact", "--device", "cpu", "--expert-counts", counts)
    assert done.returncode == 0, done.stderr
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text.read_bytes()[:-1], add_bos=True)
    with counting(engine.runner.model) as counted:
        *_, expected = measure(engine.runner, cut(ids, 60), tokenizer.bos_id)
    said = f"Final estimate: PPL = {expected.perplexity:.4f} +/- {expected.standard_error:.5f}\n"
    assert done.stdout.decode() == said
    assert re.search(
        rf"\| {expected.tokens} tokens scored in {expected.windows} windows of 60 \|", done.stderr.decode()
    )
    assert done.stderr.count(b"\n") == 1
    assert read_counts(counts, 2, 5) == counted.counts
    assert list(tmp_path.iterdir()) == [counts]
    counts.write_text('{"counts": [[1, 1, 1, 1, 1], [2, 2, 2, 2, 2]]}')  # the same model's, which are replaced
    done = run(
        path, "-f", text, "-c", 60, "--precision", "exact", "--device", "cpu", "--expert-counts", counts, "--json"
    )
    answer = json.loads(done.stdout)
    assert read_counts(counts, 2, 5) == counted.counts
    assert answer["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert answer["standard_error"] == pytest.approx(expected.standard_error, rel=1e-9)
    told = {key: answer[key] for key in ("tokens_scored", "windows", "context", "model", "file", "precision")}
    assert told == {
        "tokens_scored": expected.tokens,
        "windows": expected.windows,
        "context": 60,
        "model": str(path),
        "file": str(text),
        "precision": "exact",
    }
    assert answer["seconds"] > 0


def test_what_is_refused(path, text, tmp_path):
    """In one line, and before anything is computed."""
    (tmp_path / "empty").touch()
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "other.json").write_text('{"counts": [[1]]}')
    refused = {
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
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        refused["cannot be written in"] = [path, "-f", text, "--expert-counts", tmp_path / "locked" / "counts.json"]
    for said, arguments in refused.items():
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, b"")
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr.decode())
        assert said in done.stderr.decode()
    for arguments in ([path], [path, "-f", text, "-c", 2], [path, "-f", text, "-c", "many"]):
        assert run(*arguments).returncode == 2
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_model_that_computes_no_number(tmp_path):
    path = write_random_mixtral(tmp_path / "damaged.gguf", layers=1)
    norm = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(FileFormatError, match="no number in window 1: "):
        next(measure(fiddler.load(path, device="cpu").runner, cut(IDS, 50), 1))

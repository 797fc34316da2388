"""gpt-oss with its experts divided between both sides, which are the CPU: logits against transformers'."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fiddler
from fiddler.telemetry.recorder import SILENT
from oracles.both_sides_runner import runner_of_both_sides
from oracles.families import CASES, FamilyReference, make_family_checkpoint
from oracles.fast_logits import check_fast_logits
from oracles.flipped_experts import ChosenExperts

EXACT, FAST, FAST_INT8 = 1e-4, 1.5e-2, 2.5e-2  # as in `tests/models/test_families.py`
PLACED = {
    "no residents": [[], [], []],
    "some": [[0, 5], [], [1, 2, 7]],
    "a whole layer": [[3], [*range(8)], []],
}


@pytest.fixture(scope="module", params=[name for name in CASES if name.startswith("gpt-oss")])
def model(request, tmp_path_factory):
    folder = make_family_checkpoint(CASES[request.param], tmp_path_factory.mktemp("gpt-oss") / "hf")
    fiddler.convert(folder, folder.with_suffix(".gguf"))
    return request.param, FamilyReference(folder), folder.with_suffix(".gguf")


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_exact_logits_of_a_prompt_and_of_single_tokens_are_those_of_transformers(model, placed):
    name, reference, path = model
    ids = torch.randint(3, 512, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, runner = reference(ids), runner_of_both_sides(path, SILENT, placed, max_tokens=30)
    sequence = runner.sequence()
    logits = runner.step([(sequence, ids[:40])], wanted=range(40)).logits
    by_token = [runner.step([(sequence, [token])]).logits for token in ids[40:]]
    assert (torch.cat([logits, *by_token]) - expected).norm() <= EXACT * expected.norm()
    if "wider" in name:  # there an expert has four times the rows that are divided at least
        split = runner.orchestrator.split(2, np.ones(8, np.int64))
        assert 0 < split.cpu_rows.sum() < 256 * 8


@pytest.mark.parametrize("placed", [[[0, 5], [], [1, 2, 7]]], ids=["some"])
def test_fast_logits_are_those_of_transformers_but_for_roundings(model, placed):
    name, reference, path = model
    recorder = ChosenExperts()
    runner = runner_of_both_sides(path, recorder, placed, exact=False)

    def logits(ids):
        return runner.step([(runner.sequence(), ids)], wanted=range(len(ids))).logits

    check_fast_logits(SimpleNamespace(logits=logits), recorder, reference, FAST_INT8 if "MXFP4" in name else FAST)

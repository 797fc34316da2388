"""DBRX in fast precision: activations rounded to bf16, where no rounding changes the choice of an expert."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.telemetry.recorder import SilentRecorder
from oracles.families import CASES, FamilyReference, make_family_checkpoint

FAST = 1.5e-2  # relative L2 error of a sequence's logits


class ChosenExperts(SilentRecorder):
    """Records which experts are chosen, of each layer and step."""

    wants_expert_ids = True

    def __init__(self):
        self.steps = []

    def chosen(self, layer, expert_ids):
        self.steps.append(expert_ids.sort(-1).values)


def engine_and_recorder(path, precision):
    recorder = ChosenExperts()
    return fiddler.load(path, precision=precision, device="cpu", recorder=recorder), recorder


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dbrx")])
def test_fast_logits_match_transformers_where_the_same_experts_are_chosen(name, tmp_path):
    folder = make_family_checkpoint(CASES[name], tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    engines = [engine_and_recorder(tmp_path / "model.gguf", precision) for precision in ("fast", "exact")]
    reference, compared = FamilyReference(folder), 0
    for seed in range(8):
        ids = torch.randint(0, 512, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits, chosen = [], []
        for engine, recorder in engines:
            recorder.steps.clear()
            logits.append(engine.logits(ids))
            chosen.append(torch.stack(recorder.steps))  # [layers, T, K]
        flipped = (chosen[0] != chosen[1]).any(-1).any(0).nonzero()[:, 0].tolist()
        clean = flipped[0] if flipped else len(ids)
        expected = reference(ids)
        compared += clean
        assert torch.linalg.norm(logits[0][:clean] - expected[:clean]) <= FAST * torch.linalg.norm(expected[:clean])
    assert compared > 48, f"an expert flips early in most sequences: {compared} of 96 positions compared"

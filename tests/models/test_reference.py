"""The engine's logits against transformers' on random Mixtrals, converted by `fiddler convert`.

In exact precision the two compute the same function. In fast precision activations are rounded to bf16, so a router
whose margin is less than that rounding may choose another expert: a jump, not an error. Positions from a sequence's
first jump on are counted and left out of the comparison.
"""

from __future__ import annotations

import pytest
import torch

import fiddler
from oracles.flipped_experts import ChosenExperts
from oracles.reference import Reference, Shape, make_checkpoint

SHAPES = {
    "plain": Shape(),
    "odd width": Shape(D=50, H=5, G=5, head_dim=10, E=3, F=33),
    "96 wide experts, top-1": Shape(K=1, E=4),
    "top-3 of 16": Shape(E=16, K=3, L=3, shard="150KB"),
    "GQA 4": Shape(H=8, G=2, D=72, theta=1e4, head_dim=16),
    "GQA 8, wide heads": Shape(H=8, G=1, head_dim=24, D=40, fused=True),
    "window": Shape(window=7, L=3),
    "tied": Shape(tied=True, E=3),
    "fused, 3 shards": Shape(fused=True, shard="420KB", L=3, theta=1e4),
    "f16": Shape(dtype="f16"),
    "f16 odd": Shape(dtype="f16", D=66, H=3, G=3, head_dim=22, E=5, K=3, F=130, window=16),
    "f16 tied, fused": Shape(dtype="f16", tied=True, fused=True, E=4, K=1, theta=1e4),
}
EXACT, FAST = 1e-4, 1.5e-2  # relative L2 error of a sequence's logits


def first_jump(engine, router_logits, k, chosen):
    """(position, layer, margin, norm) of router logits where an expert first differs from the reference's, or None."""
    jumps = []
    for layer, logits in enumerate(router_logits):
        expected = torch.topk(logits, k).indices.sort(-1).values
        differs = (torch.cat(chosen[layer]).sort(-1).values != expected).any(-1).nonzero()[:, 0].tolist()
        ordered = logits.sort(-1, descending=True).values
        margins = ordered[:, k - 1] - ordered[:, min(k, logits.shape[1] - 1)]
        if differs:  # later jumps may follow from it; its own margin must be a rounding's
            jumps.append((differs[0], layer, float(margins[differs[0]]), float(logits[differs[0]].norm())))
    return min(jumps, default=None)


def sequences(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 7, 12, 12, 20, 20, 40)]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_random_mixtrals_match_transformers(name, tmp_path, capsys):
    shape = SHAPES[name]
    folder = make_checkpoint(shape, tmp_path / "hf")
    if "shard" in name:
        assert len(list(folder.glob("*.safetensors"))) == 3
    fiddler.convert(folder, tmp_path / "model.gguf")
    reference = Reference(folder)
    report = []
    for precision, bound in (("exact", EXACT), ("fast", FAST)):
        recorder = ChosenExperts()
        engine = fiddler.load(tmp_path / "model.gguf", precision=precision, recorder=recorder)
        compared = total = 0
        worst = 0.0
        for ids in sequences(len(name)):
            recorder.by_layer.clear()
            actual = engine.logits(ids)
            expected, router_logits = reference(ids)
            assert actual.shape == expected.shape
            assert actual.dtype == torch.float32
            jump = first_jump(engine, router_logits, shape.K, recorder.by_layer)
            clean = len(ids) if jump is None else jump[0]
            if jump is not None:
                assert precision == "fast", f"expert differs in exact precision: {jump}"
                assert jump[2] <= FAST * jump[3], f"an expert was flipped against a clear margin: {jump}"
            total, compared = total + len(ids), compared + clean
            if clean == 0:
                continue
            actual, expected = actual[:clean], expected[:clean]
            error = float((actual - expected).norm() / expected.norm())
            worst = max(worst, error)
            assert error < bound
            for t in (actual.argmax(-1) != expected.argmax(-1)).nonzero()[:, 0].tolist():
                top = expected[t].topk(2).values
                assert precision == "fast", f"argmax differs at {t} in exact precision"
                assert float(top[0] - top[1]) <= FAST * float(expected[t].norm())
        assert compared >= total // 2, f"{total - compared} of {total} positions follow a flipped expert"
        report.append(
            f"{precision} {worst:.1e}" + (f" ({total - compared} of {total} after a flip)" * (compared < total))
        )
    with capsys.disabled():
        print(f"  {name}: {', '.join(report)}")  # noqa: T201

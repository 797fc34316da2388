"""Positions where a model in fast precision chooses other experts than the reference, and by how little.

A rounding before a router may flip a choice that hangs by less than it: a jump, not an error. Positions whose logits
follow from a flip are left out of a comparison; the flip itself is held to a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.telemetry.recorder import SilentRecorder

__all__ = ["ChosenExperts", "Flips", "RouterStep", "flips"]


class ChosenExperts(SilentRecorder):
    """Records which experts are chosen: layer -> [T, K] of each step."""

    wants_expert_ids = True

    def __init__(self) -> None:
        self.by_layer: dict[int, list[Tensor]] = {}

    def chosen(self, layer: int, expert_ids: Tensor) -> None:
        self.by_layer.setdefault(layer, []).append(expert_ids.clone().cpu())


@dataclass(frozen=True)
class RouterStep:
    """A reference's router over a sequence: its logits [T, E], and its rule: changed logits [T, E] -> chosen [T, K].

    groups: of experts, of which the rule first chooses the best.
    """

    logits: Tensor
    choose: Callable[[Tensor], Tensor]
    groups: int = 1


class Flips(NamedTuple):
    """The positions [T] whose logits follow from no flip; a line about the first flip that no rounding explains."""

    clean: Tensor
    clear: str | None


def flips(steps: Sequence[RouterStep], chosen: Mapping[int, Sequence[Tensor]], relative: float, tokens: int) -> Flips:
    """Compare the chosen experts of a sequence of `tokens` with the reference's; a model without routers flips nowhere.

    A rounding changes two logits against each other by no more than `relative` of the norm of the position's logits.
    A flip reaches all later positions by attention, but for one in the last layer, which reaches its own only.
    """
    clean, clear = torch.ones(tokens, dtype=torch.bool), None
    assert len(steps) == len(chosen), f"{len(steps)} routers of the reference, {len(chosen)} of the model"
    for layer, step in enumerate(steps):
        actual = torch.cat(list(chosen[layer])).sort(-1).values
        differs = (actual != step.choose(step.logits).sort(-1).values).any(-1)
        for position in (differs & clean).nonzero()[:, 0].tolist():
            if clean[position] and not _by_a_rounding(step, position, actual[position], relative):
                clear = clear or f"other experts at position {position} in layer {layer}"
            clean[position if layer == len(steps) - 1 else slice(position, None)] = False
    return Flips(clean, clear)


def _by_a_rounding(step: RouterStep, position: int, actual: Tensor, relative: float) -> bool:
    """Whether the reference's rule chooses `actual` [K], too, with these logits raised and all others lowered.

    In a rule with groups an unchosen expert may count for its group: then those of the chosen groups stay as they are.
    """
    row = step.logits[position]
    change = relative * float(row.norm()) / 2
    is_chosen = torch.zeros_like(row, dtype=torch.bool).scatter(0, actual, True)
    in_chosen_group = is_chosen.view(step.groups, -1).any(-1, keepdim=True).expand(-1, len(row) // step.groups)
    for lowered in (~is_chosen, ~in_chosen_group.reshape(-1)):
        changed = step.logits.clone()
        changed[position] += change * is_chosen.float() - change * lowered.float()
        if torch.equal(step.choose(changed)[position].sort().values, actual):
            return True
    return False

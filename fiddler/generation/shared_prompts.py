"""Requests whose prompts begin alike: the first one reads, the others wait. Knows tokens; no memory and no steps."""

from __future__ import annotations

from collections.abc import Iterable

from fiddler.generation.sequence_group import SequenceGroup
from fiddler.runtime.runner import Runner

__all__ = ["awaits_prompt"]

_WORTH_WAITING = 64  # tokens that a prompt has in common with one that is being read


def awaits_prompt(group: SequenceGroup, running: Iterable[SequenceGroup], runner: Runner) -> bool:
    """Whether a running group reads a prompt whose beginning is this one's, too: it need not be computed twice."""
    if not group.reuse or not runner.shares:
        return False
    prompt, first, known = group.prompt, group.prompt[:_WORTH_WAITING], -1
    if len(first) < _WORTH_WAITING:
        return False
    for other in running:
        cache = other.sequences[0].cache
        if cache is None or cache.length >= len(other.prompt) or other.prompt[:_WORTH_WAITING] != first:
            continue
        known = runner.matched(prompt) if known < 0 else known
        more = prompt[: known + 1]
        if len(more) > known and other.prompt[: known + 1] == more:
            return True
    return False

"""The steps of a `tokenizer.json`'s normaliser, pre-tokenizer, decoder or post-processor. Knows no single step."""

from __future__ import annotations

__all__ = ["steps_of"]


def steps_of(value: object, key: str) -> list[dict[str, object]]:
    """A part as a flat list of steps, `Sequence`s unfolded; `key`: under which a sequence holds its steps."""
    steps: list[dict[str, object]] = []
    stack = [] if value is None else [value]
    while stack:
        step = stack.pop()
        if isinstance(step, dict) and step.get("type") == "Sequence":
            inner = step.get(key)
            stack += reversed(inner if isinstance(inner, list) else [])
        else:
            steps.append(step if isinstance(step, dict) else {"type": step})
    return steps

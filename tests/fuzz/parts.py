"""Model files changed in their parts, values and tensors. What opens must compute without reading a byte too many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fiddler import kernels
from fiddler.files.gguf_file import GgufFile
from fiddler.files.model_file import ModelFile
from fiddler.loading import load
from fuzz.draw import Draw
from fuzz.guarded_pages import GuardedFile
from fuzz.targets import Target, opened
from oracles.bad_gguf import BF16, F16, F32, Draft, Entry, mixtral
from oracles.gguf_values import KEYS, NAMES, VALUES, VOCABULARY_KEYS
from oracles.small_families import GOOD, drafted

__all__ = ["available", "parts_target"]

SIZES = (0, 1, 2, 4, 6, 8, 16, 24, 32, 48, 64, 262)
FAMILIES = (*sorted(GOOD), "mixtral")


def changed(draw: Draw) -> Draft:
    """The smallest model of a family with up to three changes."""
    family = draw.choice(FAMILIES)
    draft = mixtral() if family == "mixtral" else drafted(family, byte_level=bool(draw.below(2)))
    for _ in range(draw.below(4)):
        if draw.below(3):
            _change_value(draft, family, draw)
        else:
            _change_tensor(draft, draw)
    return draft


def _change_value(draft: Draft, family: str, draw: Draw) -> None:
    prefix = "llama" if family == "mixtral" else family
    keys: list[str | bytes] = [key for key, _ in draft.pairs]
    keys += [*(f"{prefix}.{key}" for key in KEYS), *(f"tokenizer.ggml.{key}" for key in VOCABULARY_KEYS)]
    key = draw.choice(keys)
    if key in dict(draft.pairs) and draw.below(8) == 1:
        draft.drop(str(key))
    else:
        draft.set(str(key), draw.choice((*VALUES, *(value for _, value in draft.pairs))))


def _change_tensor(draft: Draft, draw: Draw) -> None:
    entry, kind = draw.choice(draft.entries), draw.below(6)
    if kind == 0:
        entry.kind = draw.choice((F32, F16, BF16))
    elif kind == 1:
        entry.shape = [draw.choice(SIZES) for _ in range(1 + draw.below(4))]
    elif kind == 2:
        draft.entries.remove(entry)
    elif kind == 3:
        draft.entries.append(Entry(draw.choice(NAMES), list(entry.shape), entry.kind))
    elif kind == 4:
        entry.offset = draw.choice((0, 1, 32, 1 << 20, 1 << 62))
    else:
        other = draw.choice(draft.entries)
        entry.name, other.name = other.name, entry.name


def parts_target(tiers: Sequence[str]) -> Target:
    """Changed models, of which those that open compute logits and two tokens; with the kernels of these tiers."""

    def run(data: bytes, folder: Path) -> None:
        draw = Draw(data)
        draft = changed(draw)
        path = folder / "model.gguf"
        path.write_bytes(_with_weights(draft))
        _compute(opened(path).file, draw.choice(("exact", "fast")), draw.choice(tiers))

    seeds = [bytes([family, byte_level, 0, 1, tier]) for family in range(len(FAMILIES)) for byte_level in (0, 1)
             for tier in range(len(tiers))]  # fmt: skip
    return Target("gguf-parts", lambda: seeds, run)


def _with_weights(draft: Draft) -> bytes:
    """The file with small numbers as weights: its own pattern of bytes has NaN and infinities, which end a step."""
    content = np.frombuffer(bytearray(draft.to_bytes()), np.uint8)
    data = content[draft.ends["padding"] : len(content) // 2 * 2].view(np.uint16)
    data[:] = np.random.default_rng(0).choice(np.array([0x3C00, 0xBC00], np.uint16), len(data))
    return content.tobytes()


def _compute(file: GgufFile, precision: str, tier: str) -> None:
    model = ModelFile.of(GuardedFile.of(file))
    with load(model, "cpu", context=16, precision=precision, kernel=tier, threads=1) as engine:
        assert engine.logits([1, 2, 3]).shape[-1] == model.config.vocab_size
        sequence = engine.runner.sequence()
        engine.runner.prefill(sequence, [1, 2])
        for token in (3, 4)[: engine.context - 2]:
            engine.runner.step([(sequence, [token])])


def available() -> list[str]:
    """The kernel tiers of this CPU."""
    return [tier.name for tier in kernels.available_tiers()]

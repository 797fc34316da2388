"""Models whose heads are whole blocks of Q8_0, and engines that store keys and values so."""

from __future__ import annotations

import dataclasses

import torch

import fiddler
from fiddler.converters.conversion import convert
from oracles.families import CASES, make_family_checkpoint

IDS = [1, *range(3, 400, 3)]
MODELS = {  # arguments of `write_random_mixtral`
    "heads of 32": {"d": 128, "head_dim": 32},
    "heads of 96": {"d": 96, "heads": 2, "kv_heads": 1, "head_dim": 96},
    "a window": {"d": 128, "head_dim": 32, "window": 40},
}


def latent_model(folder, latent):
    """A DeepSeek-V2 with latents of this width behind 8 rotated elements."""
    case = CASES["deepseek2, V2, f16, fused, tied"]
    case = dataclasses.replace(case, options={**case.options, "kv_lora_rank": latent, "qk_rope_head_dim": 8})
    path = folder / "latent.gguf"
    convert(make_family_checkpoint(case, folder / "checkpoint"), path)
    return path


def quantised(path, **options):
    """An engine with Q8_0; on the CPU and exact, unless options say otherwise."""
    return fiddler.load(
        path, cache_type_k="q8_0", cache_type_v="q8_0", **{"device": "cpu", "precision": "exact"} | options
    )


def one_by_one(engine, ids, count):
    """Logits after a prompt, and after each of the last `count` tokens, fed alone."""
    runner = engine.runner
    sequence = runner.sequence()
    rows = [runner.step([(sequence, ids[:-count])]).logits[-1]]
    return torch.stack(rows + [runner.step([(sequence, [token])]).logits[-1] for token in ids[-count:]])

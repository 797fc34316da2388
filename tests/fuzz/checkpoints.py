"""Checkpoint folders of every family, changed in config.json, tokenizer_config.json or the weights' header."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fiddler.converters.checkpoint import Checkpoint
from fuzz.draw import Draw, changed_json

__all__ = ["checkpoint", "checkpoint_seeds"]

TESTS = Path(__file__).parents[1]
TINY = TESTS / "data" / "tiny"
CONFIGS = "config.json", "tokenizer_config.json"
KEYS = (
    *("model_type", "rope_scaling", "rope_parameters", "sliding_window", "num_experts", "num_local_experts", "n_group"),
    *("moe_intermediate_size", "norm_topk_prob", "n_shared_experts", "first_k_dense_replace", "q_lora_rank"),
    *("quantization_config", "head_dim", "attention_bias", "tie_word_embeddings", "torch_dtype", "hidden_act"),
)
MAKE = """
import sys
from pathlib import Path
from oracles.families import make_family_checkpoint
from oracles.family_cases import CASES
for number, case in enumerate({case.kind: case for case in CASES.values()}.values()):
    make_family_checkpoint(case, Path(sys.argv[1]) / f"{number:02}")
"""


@cache
def _folders() -> list[Path]:
    """One folder of each family: made by transformers in a process of its own, since it takes memory."""
    made = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    subprocess.run([sys.executable, "-c", MAKE, made], cwd=TESTS, check=True, capture_output=True)
    return [TINY, *sorted(made.iterdir())]


def checkpoint_seeds() -> list[bytes]:
    """Of every family, each file with one change."""
    return [bytes([family, which, *range(9)]) for family in range(len(_folders())) for which in range(3)]


def checkpoint(data: bytes, folder: Path) -> None:
    """Open a changed folder, and read of each tensor what will be converted."""
    draw = Draw(data)
    source = draw.choice(_folders())
    target = folder / f"hf-{source.name}"
    if not target.exists():
        shutil.copytree(source, target)
    which, shards = draw.below(3), sorted(path.name for path in source.glob("*.safetensors"))
    name = CONFIGS[which] if which < 2 else draw.choice(shards)
    if which < 2:
        (target / name).write_text(json.dumps(changed_json(draw, json.loads((source / name).read_text()), KEYS)))
    else:
        (target / name).write_bytes(_other_header(draw, (source / name).read_bytes()))
    try:
        found = Checkpoint.open(target)
        for tensor in found.config.tensors(tied=found.tied):
            for matrix in found.matrices(tensor):
                assert matrix.count > 0
    finally:
        shutil.copyfile(source / name, target / name)


def _other_header(draw: Draw, weights: bytes) -> bytes:
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.dumps(changed_json(draw, json.loads(weights[8 : 8 + size]), ("__metadata__",))).encode()
    length = struct.unpack("<Q", draw.take(8).ljust(8, b"\0"))[0] if draw.below(8) == 1 else len(header)
    return struct.pack("<Q", length) + header + weights[8 + size :]

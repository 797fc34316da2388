"""Which folder is meant, and whether it is a Hugging Face checkpoint at all.

Follows the hub cache's `models--ORG--NAME`, and refuses by their cause the folders that look like a checkpoint and are
none: LoRA adapters, Mistral's own format, GGUF files, Git LFS pointers. Reads no weights, knows no architecture.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from fiddler.converters.json_object import read_object
from fiddler.errors import CheckpointError, quoted

__all__ = ["check_folder", "find_folder", "is_quantised", "missing_weights"]

_LFS = b"version https://git-lfs"
_LARGEST_POINTER = 1024  # bytes, by the specification of Git LFS
_QUANTISED = re.compile(r"\.(qweight|qzeros|SCB|weight_(scale|scale_inv|scale_2|packed|format)|weight\.absmax)$")
_SHARD = re.compile(r"(?P<stem>model|pytorch_model)-\d{5}-of-\d{5}(?P<suffix>\.safetensors|\.bin)")
_READ = ("*.json", "tokenizer.model", "*.jinja", "*.safetensors", "*.bin")


def find_folder(path: Path) -> Path:
    """The folder that `path` stands for: itself, or the snapshot of a hub cache's `models--ORG--NAME`.

    Raises CheckpointError if `path` is no folder, or a cache without the snapshot that it names.
    """
    try:
        problem = None if stat.S_ISDIR(path.stat().st_mode) else "is a file"
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    if problem is not None:
        raise CheckpointError(f"{path} {problem}; give the folder of a Hugging Face checkpoint")
    snapshots, main = path / "snapshots", path / "refs" / "main"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return path
    revisions = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    if main.is_file():
        revision = main.read_bytes()[:200].decode("utf-8", "replace").strip()
        if revision in revisions:
            return snapshots / revision
        raise CheckpointError(
            f"{main} names the snapshot {quoted(revision, 60)}, which is not there; download it again"
        )
    if len(revisions) == 1:
        return snapshots / revisions[0]
    raise CheckpointError(
        f"{snapshots} holds {len(revisions)} snapshots and no refs/main chooses one; give one of them"
    )


def check_folder(folder: Path) -> None:
    """Raise CheckpointError, with the cause, if `folder` cannot be a whole model in Hugging Face's format."""
    for pattern in _READ:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and _is_pointer(path):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_object(adapter, "").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} is a LoRA adapter of {quoted(base, 80)} (adapter_config.json), not a whole model; "
            "merge it with peft (merge_and_unload, then save_pretrained) and convert the merged folder"
        )
    if (folder / "config.json").exists():
        return
    own = [path.name for name in ("params.json", "consolidated*", "tekken.json") for path in sorted(folder.glob(name))]
    if own:
        raise CheckpointError(
            f"{folder} is in Mistral's own format ({own[0]}, no config.json); give the folder in Hugging Face's "
            "format, with config.json and model*.safetensors"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} has no config.json, but GGUF files; give {ggufs[0]} itself to `fiddler run`")
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        raise CheckpointError(f"{folder} has no config.json, but its folder {inner[-1]} has; give that one")


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(_LARGEST_POINTER + 1)
    except OSError:
        return False  # whoever needs the file says why
    return len(start) <= _LARGEST_POINTER and start.startswith(_LFS)


def missing_weights(folder: Path) -> CheckpointError:
    """The error for a folder with config.json and no weights that transformers would read."""
    for pattern, cause in (
        ("consolidated*", "in Mistral's own format"),
        ("adapter_model.*", "of a LoRA adapter"),
        ("*.gguf", "as GGUF; give that file to `fiddler run`"),
        ("*.onnx", "as ONNX"),
        ("*.h5", "for TensorFlow"),
        ("*.msgpack", "for Flax"),
        ("*.pt*", "under a name that transformers does not read"),
        ("*.safetensors", "under a name that transformers does not read"),
        ("*.bin", "under a name that transformers does not read"),
    ):
        found = sorted(path.name for path in folder.glob(pattern))
        if found and (shard := _SHARD.fullmatch(found[0])):
            index = f"{shard['stem']}{shard['suffix']}.index.json"
            return CheckpointError(f"{folder} holds {found[0]}, but {index} is missing; download it again")
        if found:
            return CheckpointError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json; {found[0]} holds weights "
                f"{cause}; download the model in Hugging Face's format"
            )
    return CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json, nor pytorch_model.bin; "
        "download the whole checkpoint"
    )


def is_quantised(name: str) -> bool:
    """Whether a tensor of this name belongs to GPTQ, AWQ, bitsandbytes, FP8 or compressed weights."""
    return _QUANTISED.search(name) is not None

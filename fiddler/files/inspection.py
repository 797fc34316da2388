"""Describes a model file in plain values, for `fiddler inspect`. Reads no tensor data, needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.files.gguf_file import GgufFile
from fiddler.files.gguf_header import printable
from fiddler.files.model_file import ModelFile
from fiddler.models.architecture import EXPERTS, AttentionBias, QkNorm, Role, Window
from fiddler.models.config import Config

__all__ = ["describe", "size_text", "to_text"]

_MAX_CHARS = 200  # of a metadata string


def describe(path: Path) -> dict[str, Any]:
    """A file's architecture, sizes, tensors and tokenizer as JSON-ready values; sizes in bytes.

    `runnable` is true, or why the model does not run, in one line. Of a model that is not a known one, `architecture`,
    `bytes` and `tokenizer` hold what any GGUF has. Metadata is shortened: long strings are cut, arrays become their
    size and type. Infinities and NaN become strings. Raises FileFormatError, one line, if the file is no GGUF.
    """
    file = GgufFile.open(path)
    model, runnable = _checked(file)
    return {
        "path": str(path),
        "name": _plain(file.metadata.get("general.name")),
        "gguf_version": file.version,
        "runnable": runnable,
        "architecture": {
            "name": _plain(file.metadata.get("general.architecture")),
            "parameters": sum(math.prod(t.shape) for t in file.tensors.values()),
        }
        | (_architecture(model) if model else {}),
        "bytes": {"file": file.nbytes, "weights": sum(t.nbytes for t in file.tensors.values())}
        | (_expert_bytes(model) if model else {}),
        "types": dict(Counter(t.type for t in file.tensors.values())),
        "tokenizer": _tokenizer(file),
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "type": t.type,
                "bytes": t.nbytes,
                "offset": t.offset,
                "part": t.part,
            }
            for t in file.tensors.values()
        ],
    }


def _checked(file: GgufFile) -> tuple[ModelFile | None, bool | str]:
    """The model if its parts agree, and whether it runs: true, or why not."""
    model = None
    try:
        model = ModelFile.of(file)
        model.check_runnable()
        assert model.tokenizer.vocab_size == model.config.vocab_size
    except FileFormatError as error:
        return model, str(error).removeprefix(f"{file.shown_path}: ")
    return model, True


def _expert_bytes(model: ModelFile) -> dict[str, int]:
    config = model.config
    tensors = config.tensors(tied=model.tied)
    stored = {name: sum(each.nbytes for each in model.stored(name)) for name in tensors}
    expert_bytes = sum(nbytes for name, nbytes in stored.items() if tensors[name].role in EXPERTS)
    per_expert = expert_bytes // max(1, len(config.sparse_layers) * config.expert_count)
    return {
        "experts": expert_bytes,
        "dense": sum(stored.values()) - expert_bytes,
        "one_expert": per_expert,
        "experts_read_per_token": per_expert * config.expert_used_count * len(config.sparse_layers),
    }


def _architecture(model: ModelFile) -> dict[str, Any]:
    config = model.config
    return {
        "layers": config.block_count,
        "width": config.embedding_length,
        "expert_width": config.expert_feed_forward_length,
        "experts": config.expert_count,
        "experts_per_token": config.expert_used_count,
        "one_tensor_an_expert": model.single_experts,
        "heads": config.head_count,
        "kv_heads": config.head_count_kv,
        "head_dim": config.head_dim,
        "context": config.context_length,
        "sliding_window": config.sliding_window,
        "rope_freq_base": config.rope_freq_base,
        "rms_epsilon": config.rms_epsilon,
        "tied_embeddings": model.tied,
        "dense_layers": config.leading_dense_block_count,
        "dense_width": config.feed_forward_length,
        "shared_expert_width": config.expert_shared_feed_forward_length,
        "parts": _parts(config),
    }


def _parts(config: Config) -> dict[str, str]:
    """The kinds of parts of the model's blocks, by name."""
    architecture, rule = config.architecture, config.router
    qk_norm = architecture.qk_norm if config.has(Role.QUERY_NORM) else QkNorm.NONE
    bias = architecture.attention_bias if config.has(Role.QUERY_BIAS) else AttentionBias.NONE
    window = Window.NONE if config.sliding_window is None else architecture.window
    router = [str(rule.scoring)]
    router += ["selection bias"] if config.has(Role.SELECTION_BIAS) else []
    router += [f"{rule.groups_used} of {rule.groups} groups"] if rule.groups > 1 else []
    router += [f"top {config.expert_used_count}"]
    router += ["renormalised"] if rule.renormalise else []
    router += [f"times {rule.scale:g}"] if rule.scale != 1.0 else []
    if not architecture.has_experts:
        router = ["none"]
    rotated = "" if config.rotated == config.head_dim else f", {config.rotated} of {config.head_dim} elements"
    return {
        "norm": str(architecture.norm),
        "qk_norm": str(qk_norm),
        "attention_bias": str(bias),
        "sinks": str(architecture.sinks),
        "window": str(window),
        "rotary": f"{architecture.rotary}{rotated}",
        "router": ", ".join(router),
        "activation": str(architecture.activation),
        "expert_bias": str(architecture.expert_bias),
        "shared_experts": str(architecture.shared_experts) if config.has(Role.SHARED_GATE) else "none",
        "dense_layers": str(architecture.dense_layers) if config.leading_dense_block_count else "none",
    }


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _plain(metadata.get("tokenizer.ggml.model")),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "bos": _plain(metadata.get("tokenizer.ggml.bos_token_id")),
        "eos": _plain(metadata.get("tokenizer.ggml.eos_token_id")),
        "add_bos": _plain(metadata.get("tokenizer.ggml.add_bos_token")),
        "chat_template": "tokenizer.chat_template" in metadata,
    }


def size_text(nbytes: int) -> str:
    """Bytes as a reader takes them in: 93.41 GB, 7.04 MB, 0.51 kB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if nbytes >= 0.1 * u), (1e3, "kB"))
    return f"{nbytes / unit:.2f} {name}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e8 else f"{parameters / 1e6:.3g} M"


def to_text(description: dict[str, Any]) -> str:
    """Format `describe`'s result as text without control characters; with "kernels" if the caller adds them."""
    a, sizes, tokenizer = description["architecture"], description["bytes"], description["tokenizer"]
    kernels = description.get("kernels")
    lines = [
        f"{printable(description['name'] or description['path'], _MAX_CHARS)}: {_count(a['parameters'])} "
        f"parameters, {size_text(sizes['file'])}",
        *([] if description["runnable"] is True else [f"  does not run: {description['runnable']}"]),
        *(_shape_lines(a, sizes) if "layers" in a else [f"  architecture {printable(a['name'])}"]),
        f"  tokenizer {printable(tokenizer['model'])}, {tokenizer['vocabulary'] or 'no'} tokens, "
        f"BOS {printable(tokenizer['bos'])}, EOS {printable(tokenizer['eos'])}, "
        f"chat template: {'yes' if tokenizer['chat_template'] else 'no'}",
        *([f"  CPU kernels: {kernels['runs']}; this CPU has {', '.join(kernels['available'])}"] if kernels else []),
        "  types: " + ", ".join(f"{count} {kind}" for kind, count in description["types"].items()),
        "",
    ]
    width = max((len(t["name"]) for t in description["tensors"]), default=0)
    lines += [
        f"  {t['name']:<{width}}  {t['type']:<5} {'x'.join(map(str, t['shape'])):<18} {size_text(t['bytes']):>10}"
        for t in description["tensors"]
    ]
    return "\n".join(lines)


def _shape_lines(a: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    experts = f"{a['experts']} experts of width {a['expert_width']}, {a['experts_per_token']} a token"
    expert_sizes = [
        f"  experts {size_text(sizes['experts'])} ({size_text(sizes['one_expert'])} each), "
        f"all other weights {size_text(sizes['dense'])}",
        *(["  one tensor an expert, as in files from before April 2024"] if a["one_tensor_an_expert"] else []),
        f"  experts read for one token: {size_text(sizes['experts_read_per_token'])}",
    ]
    return [
        f"  {a['layers']} layers of width {a['width']}, {experts if a['experts'] else 'no experts'}",
        *_dense_lines(a),
        "  " + "; ".join(f"{name.replace('_', ' ')}: {part}" for name, part in a["parts"].items() if part != "none"),
        f"  {a['heads']} heads of {a['head_dim']}, {a['kv_heads']} KV heads; context {a['context']}"
        + (f", sliding window {a['sliding_window']}" if a["sliding_window"] else "")
        + f"; RoPE base {a['rope_freq_base']:g}",
        *(expert_sizes if a["experts"] else []),
    ]


def _dense_lines(a: dict[str, Any]) -> list[str]:
    """What every token is computed by beside experts, where there is such."""
    parts = []
    if a["dense_layers"]:
        first = f"the first {a['dense_layers']}" if a["experts"] else "every layer"
        parts.append(f"{first} dense, of width {a['dense_width']}")
    if a["shared_expert_width"]:
        parts.append(f"shared experts of width {a['shared_expert_width']} in all")
    return [f"  {'; '.join(parts)}"] if parts else []


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return f"[{value.size} x {value.dtype}]"
    if isinstance(value, list):
        return f"[{len(value)} strings]"
    if isinstance(value, str) and len(value) > _MAX_CHARS:
        return value[:_MAX_CHARS] + "..."
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

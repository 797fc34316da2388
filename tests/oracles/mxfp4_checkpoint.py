"""Rewrites a saved gpt-oss with its experts in blocks of MXFP4, as the published one has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["is_packed", "pack_experts"]

_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # E2M1; codes from 8 on are their negatives


def is_packed(folder: Path) -> bool:
    """Whether config.json says so."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def pack_experts(folder: Path) -> None:
    """Replace `gate_up_proj` and `down_proj` of each layer by `_blocks` and `_scales`, in the files where they are."""
    for path in folder.glob("*.safetensors"):
        tensors, packed = load_file(path), {}
        for name, tensor in tensors.items():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                packed[f"{name}_blocks"], packed[f"{name}_scales"] = _packed(tensor.transpose(1, 2))
            else:
                packed[name] = tensor
        save_file(packed, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = {name: path.name for path in sorted(folder.glob("*.safetensors")) for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))


def _packed(weights: Tensor) -> tuple[Tensor, Tensor]:
    """[E, rows, K] -> blocks [E, rows, K / 32, 16] and scales [E, rows, K / 32], rounded to the nearest."""
    experts, rows, columns = weights.shape
    blocks = weights.float().numpy().reshape(experts, rows, columns // 32, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    scaled = np.abs(blocks) / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - _NUMBERS).argmin(-1).astype(np.uint8)
    codes |= np.where(np.signbit(blocks), 8, 0).astype(np.uint8)
    scales = torch.from_numpy((exponents + 127).astype(np.uint8))
    return torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4).contiguous(), scales.contiguous()

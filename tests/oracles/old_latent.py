"""Rewrites a DeepSeek-V2 or V3 GGUF in the form that llama.cpp's converter wrote until 2025.

There `attn_kv_b` holds each head's matrices of keys and of values, and the lengths of keys and values are a head's.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

__all__ = ["in_old_form"]

PREFIX = "deepseek2.attention"


def in_old_form(source: Path, target: Path) -> Path:
    """Write `target`, the model of `source` in the old form; return it. The weights have float16."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "deepseek2")
    heads = reader.fields[f"{PREFIX}.head_count"].contents()
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.alignment"):
            continue
        value = field.contents()
        if name in (f"{PREFIX}.key_length_mla", f"{PREFIX}.value_length_mla"):
            continue
        if name in (f"{PREFIX}.key_length", f"{PREFIX}.value_length"):
            value = reader.fields[f"{name}_mla"].contents()
        if name == f"{PREFIX}.head_count_kv":
            value = heads
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type=sub_type)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, values in tensors.items():
        if name.endswith("attn_v_b.weight"):
            continue
        if name.endswith("attn_k_b.weight"):
            of_values = tensors[name.replace("attn_k_b", "attn_v_b")]
            both = np.concatenate([values.swapaxes(1, 2), of_values], 1)  # [H, key + value, latent]
            name, values = name.replace("attn_k_b", "attn_kv_b"), both.reshape(-1, both.shape[-1])
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

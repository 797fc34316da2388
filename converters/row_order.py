"""The order of queries' and keys' rows in GGUF, for RoPE as ggml computes it. Knows arrays; no files."""

from __future__ import annotations

from fiddler.converters.safetensors_file import Array

__all__ = ["interleave"]


def interleave(rows: Array, head_dim: int) -> Array:
    """Reorder whole heads' rows [heads * head_dim, D] from transformers' RoPE to ggml's (`ROPE_TYPE_NORM`).

    transformers rotates row `i` of a head with row `i + head_dim / 2`; ggml rotates neighbours. So row `2 i + j` of
    each head in the result is row `j * head_dim / 2 + i` of the input. q . k stays the same: both are reordered
    alike. llama.cpp's converter for Llama and Mixtral does the same.
    """
    pairs = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

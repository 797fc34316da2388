"""DBRX: its row of the table of architectures.

https://www.databricks.com/blog/introducing-dbrx-new-state-art-open-llm. Layer norms without biases; queries, keys and
values are one product.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import ModelTensor, Norm, Role, Rotary, Window
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import EXPERTS

__all__ = ["DBRX"]

DBRX = replace(
    MIXTRAL,
    name="DBRX",
    gguf_name="dbrx",
    norm=Norm.LAYER,
    window=Window.NONE,
    rotary=Rotary.HALVES,
    block=(
        ModelTensor(Role.ATTENTION_NORM, "attn_norm.weight", ("D",)),
        ModelTensor(Role.QUERY_KEY_VALUE, "attn_qkv.weight", ("qkv", "D")),
        ModelTensor(Role.ATTENTION_OUTPUT, "attn_output.weight", ("D", "H * head_dim")),
        ModelTensor(Role.FFN_NORM, "attn_output_norm.weight", ("D",)),
        *EXPERTS,
    ),
    may_tie=False,
)

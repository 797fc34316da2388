"""GraniteMoE (https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-base): its row of the table of architectures.

As Mixtral, with multipliers of embeddings, residuals, attention's scores and logits; Granite 3.3's has shared experts.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import SharedExperts, Window
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import ATTENTION, EXPERTS, SHARED

__all__ = ["GRANITE_MOE"]

GRANITE_MOE = replace(
    MIXTRAL,
    name="GraniteMoE",
    gguf_name="granitemoe",
    window=Window.NONE,
    shared_experts=SharedExperts.ADDED,
    block=(*ATTENTION, *EXPERTS, *(replace(tensor, optional=True) for tensor in SHARED)),
    scaled=True,
)

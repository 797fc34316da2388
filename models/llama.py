"""Dense models of GGUF's `llama`: Llama 2 and 3 (https://arxiv.org/abs/2407.21783), Mistral 7B and Nemo, TinyLlama.

Mixtral's attention (https://arxiv.org/abs/2310.06825) and one feed-forward in every layer. The same name in GGUF as
Mixtral's: only the key `llama.expert_count` tells the two apart.
"""

from __future__ import annotations

from dataclasses import replace

from fiddler.models.architecture import DenseLayers
from fiddler.models.mixtral import MIXTRAL
from fiddler.models.parts import ATTENTION, DENSE

__all__ = ["LLAMA"]

LLAMA = replace(MIXTRAL, name="Llama or Mistral", dense_layers=DenseLayers.EVERY, block=(*ATTENTION, *DENSE))

"""Random Mixtrals made, saved and run by transformers: the oracle of the whole model.

`make_checkpoint` writes a Hugging Face folder, `Reference` runs it in float32 on the weights as stored.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

__all__ = ["Reference", "Shape", "make_checkpoint"]

TINY = Path(__file__).parent / "data" / "tiny"


@dataclass(frozen=True)
class Shape:
    """A random Mixtral and how it is stored; letters as in `fiddler.models.config`."""

    D: int = 64
    F: int = 96
    L: int = 2
    H: int = 4
    G: int = 2
    E: int = 8
    K: int = 2
    head_dim: int | None = None
    window: int | None = None
    theta: float = 1e6
    tied: bool = False
    dtype: str = "bf16"
    fused: bool = False
    shard: str = "1GB"


def make_checkpoint(shape: Shape, folder: Path) -> Path:
    """Save a model that transformers makes, with the tokenizer of the tiny fixture.

    Weights are large enough that every part matters: routers decide clearly, attention prefers some positions,
    the experts' share of the residual stream is as large as the attention's.
    """
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_hidden_layers=shape.L,
        num_attention_heads=shape.H,
        num_key_value_heads=shape.G,
        head_dim=shape.head_dim,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
        max_position_embeddings=256,
        sliding_window=shape.window,
        rope_parameters={"rope_theta": shape.theta, "rope_type": "default"},
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(zlib.crc32(repr(shape).encode()))
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                gain = 2.0 if ".gate." in name else 1.0
                parameter.normal_(0.0, gain / parameter.shape[-1] ** 0.5)
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float16
    model.to(dtype).save_pretrained(folder, max_shard_size=shape.shard, save_original_format=not shape.fused)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


class Reference:
    """transformers' own forward pass in float32 over the 16-bit weights of a folder."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations
            self.model = MixtralForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
            ).eval()

    def __call__(self, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits [T, V] and, layer by layer, the router's logits [T, E]."""
        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
        return out.logits[0], list(out.router_logits)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most probable tokens one after the other, each from a full forward pass."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self(ids)[0][-1].argmax()))
        return ids[-count:]

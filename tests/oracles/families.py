"""Random checkpoints of every family that converts, and transformers' own forward pass over them."""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from oracles.family_cases import CASES, Case
from oracles.flipped_experts import RouterStep
from oracles.mxfp4_checkpoint import is_packed, pack_experts
from oracles.reference import TINY

__all__ = ["CASES", "Case", "FamilyReference", "make_family_checkpoint"]

_SIZES = {
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def make_family_checkpoint(case: Case, folder: Path) -> Path:
    """Save a random model of transformers and the tokenizer of tests/data/tiny; return the folder.

    Weights are large enough that every part matters, as in `reference.make_checkpoint`. A scale of the routed experts
    divides their last matrices: trained ones add as much as attention does with it, not without it.
    """
    config = getattr(transformers, f"{case.kind}Config")(**_SIZES, **case.options)
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.2)
            elif (tensor.dim() == 1 and name.endswith("bias")) or name.endswith(("proj_bias", "sinks")):
                tensor.normal_(0.0, 0.3)
            elif tensor.dim() > 1:
                gain = 2.0 if ".gate." in name or ".router." in name else 1.0
                if case.kind == "GptOss" and name.endswith(".experts.gate_up_proj"):
                    gain = 3.0  # so that some are clamped
                if case.kind == "GptOss" and name.endswith(".experts.down_proj"):
                    gain = 0.2  # so that experts are no louder than attention
                if name.endswith(".experts.down_proj"):
                    gain /= getattr(config, "routed_scaling_factor", None) or 1.0
                tensor.normal_(0.0, gain / tensor.shape[-1] ** 0.5)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float16
    model.to(dtype).save_pretrained(folder, max_shard_size=case.shard, save_original_format=not case.fused)
    if case.packed:
        pack_experts(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


class FamilyReference:
    """transformers' own forward pass in float32 over the 16-bit weights of a folder."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations
            options = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if is_packed(folder) else {}
            self.model = (
                transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager", **options
                )
                .float()
                .eval()
            )  # transformers 5.17 leaves experts that were MXFP4 in bf16
        self.routers: list[RouterStep] = []
        """Of the last call, layer by layer."""
        for name, module in self.model.named_modules():
            if name.endswith(".ffn.router"):  # DBRX
                rule = self.model.get_submodule(name.removesuffix(".router")).route_tokens_to_experts
                module.register_forward_hook(partial(self._add_router_of_logits, rule))
            elif name.endswith((".mlp.gate", ".router")):
                module.register_forward_hook(self._add_router)

    def __call__(self, ids: list[int]) -> Tensor:
        """Logits [T, V]."""
        self.routers = []
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def _add_router_of_logits(self, rule: Callable[[Tensor], Any], module: Any, inputs: Any, logits: Tensor) -> None:
        self.routers.append(RouterStep(logits, lambda changed: rule(changed)[1]))

    def _add_router(self, module: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        first, last = (2, 0) if outputs[2].is_floating_point() else (0, 2)  # GraniteMoE's in transformers 5.17: turned
        x, logits = inputs[0].reshape(-1, inputs[0].shape[-1]), outputs[first]

        def choose(changed: Tensor) -> Tensor:
            """The module's own choice for an input whose product with its matrix is `changed`."""
            chosen: Tensor = module.forward(x + (changed - logits) @ torch.linalg.pinv(module.weight).T)[last]
            return chosen

        self.routers.append(RouterStep(logits, choose, getattr(module, "num_group", None) or 1))

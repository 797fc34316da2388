"""Random Mixtrals that transformers builds, saves and runs: the oracle of the whole model.

`make_checkpoint` writes a Hugging Face folder, `Reference` runs it in float32 on the weights as stored.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

__all__ = ["Reference", "Shape", "from_gguf", "make_checkpoint"]

TINY = Path(__file__).parents[1] / "data" / "tiny"


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
    """Save a random model of transformers and the tokenizer of tests/data/tiny; return the folder.

    Weights are large enough that every part matters: routers decide clearly, attention prefers some positions,
    experts add as much to the residual stream as attention does.
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


def from_gguf(path: Path) -> PreTrainedModel:
    """A Mixtral or Qwen3-MoE in a GGUF as transformers' own, float32, read by the `gguf` package.

    Mixtral's q and k come back in transformers' order; Qwen3-MoE's are in it.
    """
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    fields = {key.removeprefix(f"{arch}."): field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: _values(t) for t in reader.tensors}
    output = tensors.get("output.weight")
    options = {
        "vocab_size": len(tensors["token_embd.weight"]),
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "head_dim": fields["attention.key_length"],
        "num_experts_per_tok": fields["expert_used_count"],
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "sliding_window": fields.get("attention.sliding_window"),
        "rope_parameters": {"rope_theta": fields["rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": output is None,
        "experts_implementation": "eager",
        "attn_implementation": "eager",
    }
    if arch == "llama":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=fields["expert_count"], **options))
    else:
        assert arch == "qwen3moe"
        experts = {"num_experts": fields["expert_count"], "norm_topk_prob": True}
        width = fields["expert_feed_forward_length"]
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=width, **experts, **options))
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["token_embd.weight"] if output is None else output,
    }
    for n in range(fields["block_count"]):
        state |= _layer(tensors, n, fields["attention.head_count"], fields["attention.head_count_kv"], arch == "llama")
    model.load_state_dict(state, strict=True)
    return model.eval()


def _layer(tensors: dict[str, Tensor], n: int, heads: int, kv_heads: int, half_split: bool) -> dict[str, Tensor]:
    """The weights of block `n` under transformers' names."""
    blk, layer = f"blk.{n}.", f"model.layers.{n}."
    q, k = tensors[blk + "attn_q.weight"], tensors[blk + "attn_k.weight"]
    if half_split:
        q, k = _half_split(q, heads), _half_split(k, kv_heads)
    state = {
        layer + "input_layernorm.weight": tensors[blk + "attn_norm.weight"],
        layer + "post_attention_layernorm.weight": tensors[blk + "ffn_norm.weight"],
        layer + "self_attn.q_proj.weight": q,
        layer + "self_attn.k_proj.weight": k,
        layer + "self_attn.v_proj.weight": tensors[blk + "attn_v.weight"],
        layer + "self_attn.o_proj.weight": tensors[blk + "attn_output.weight"],
        layer + "mlp.gate.weight": tensors[blk + "ffn_gate_inp.weight"],
        layer + "mlp.experts.gate_up_proj": torch.cat(
            (tensors[blk + "ffn_gate_exps.weight"], tensors[blk + "ffn_up_exps.weight"]), 1
        ),
        layer + "mlp.experts.down_proj": tensors[blk + "ffn_down_exps.weight"],
    }
    if blk + "attn_q_norm.weight" in tensors:
        state |= {layer + f"self_attn.{x}_norm.weight": tensors[blk + f"attn_{x}_norm.weight"] for x in "qk"}
    return state


def _values(tensor: gguf.ReaderTensor) -> Tensor:
    shape = [int(n) for n in reversed(tensor.shape)]
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        bits = np.frombuffer(tensor.data.tobytes(), np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32).reshape(shape))
    if tensor.data.dtype == np.uint8:
        return torch.from_numpy(gguf.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(shape))
    return torch.from_numpy(np.array(tensor.data, np.float32).reshape(shape))


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from GGUF's order (0, h/2, 1, h/2 + 1, ...) back to transformers' (0, 1, ..., h/2, ...)."""
    rows = weight.view(heads, -1, weight.shape[1])
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), 1).reshape(weight.shape)

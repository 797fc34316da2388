"""Peak memory of `convert` on some layers of other families.

    python tests/tools/measure_family_memory.py --tokenizer FOLDER [FAMILY ...]

Not a test that pytest collects: a family needs up to 7 GB of disk while it runs. FOLDER holds a byte-level
tokenizer.json of at most 151936 tokens, as Qwen3's. Layers have about a real model's widths; GLM-4.5's experts are
fewer, for the disk's sake. The figure is RssAnon, as in `measure_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from tools.measure_memory import run_measured, say_row, write_shard

V, LIMIT = 151936, 1e9  # [tokens], [bytes]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """A family's `model_type` and widths; the letters of `fiddler.models.config`."""

    kind: str
    D: int
    H: int
    G: int
    head_dim: int
    E: int
    F: int
    K: int
    layers: int = 2
    config: dict[str, object] = field(default_factory=dict)


_DENSE = {"first_k_dense_replace": 1, "intermediate_size": 10944, "n_shared_experts": 2}
FAMILIES = {
    "qwen3moe": Sizes("qwen3_moe", 2048, 32, 4, 128, 128, 768, 8, config={"num_experts": 128, "norm_topk_prob": True}),
    "granitemoe": Sizes("granitemoe", 1536, 24, 8, 64, 40, 512, 8, config={"num_local_experts": 40,
                        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156,
                        "logits_scaling": 6.0}),
    "deepseek2": Sizes("deepseek_v3", 2048, 128, 128, 128, 64, 1408, 6, 3, {**_DENSE, "n_routed_experts": 64,
                       "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                       "v_head_dim": 128, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    "glm4moe": Sizes("glm4_moe", 4096, 96, 8, 128, 48, 1408, 8, 2, {**_DENSE, "n_routed_experts": 48,
                     "n_shared_experts": 1, "partial_rotary_factor": 0.5, "attention_bias": True}),
}  # fmt: skip


def attention(sizes: Sizes, prefix: str) -> Shapes:
    """Tensors of a layer's attention."""
    D, H, G, head = sizes.D, sizes.H, sizes.G, sizes.head_dim
    if sizes.kind == "deepseek_v3":
        return {
            f"{prefix}.q_a_proj.weight": (1536, D),
            f"{prefix}.q_a_layernorm.weight": (1536,),
            f"{prefix}.q_b_proj.weight": (H * 192, 1536),
            f"{prefix}.kv_a_proj_with_mqa.weight": (576, D),
            f"{prefix}.kv_a_layernorm.weight": (512,),
            f"{prefix}.kv_b_proj.weight": (H * 256, 512),
            f"{prefix}.o_proj.weight": (D, H * 128),
        }
    shapes: Shapes = {f"{prefix}.{name}_proj.weight": (rows * head, D) for name, rows in (("q", H), ("k", G), ("v", G))}
    shapes[f"{prefix}.o_proj.weight"] = (D, H * head)
    if sizes.kind == "qwen3_moe":
        shapes |= {f"{prefix}.{name}_norm.weight": (head,) for name in "qk"}
    if sizes.kind == "glm4_moe":
        shapes |= {f"{prefix}.{name}_proj.bias": (rows * head,) for name, rows in (("q", H), ("k", G), ("v", G))}
    return shapes


def feed_forward(prefix: str, width: int, hidden: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
    return shapes | {f"{prefix}.down_proj.weight": (width, hidden)}


def layer(sizes: Sizes, index: int) -> Shapes:
    """All tensors of one layer."""
    prefix, D, E, F = f"model.layers.{index}", sizes.D, sizes.E, sizes.F
    shapes: Shapes = {f"{prefix}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    shapes |= attention(sizes, f"{prefix}.self_attn")
    if sizes.kind == "granitemoe":
        moe = f"{prefix}.block_sparse_moe"
        return shapes | {
            f"{moe}.router.layer.weight": (E, D),
            f"{moe}.input_linear.weight": (E, 2 * F, D),
            f"{moe}.output_linear.weight": (E, D, F),
        }
    mlp = f"{prefix}.mlp"
    if index < int(str(sizes.config.get("first_k_dense_replace", 0))):
        return shapes | feed_forward(mlp, D, 10944)
    shapes[f"{mlp}.gate.weight"] = (E, D)
    if sizes.kind != "qwen3_moe":
        shapes[f"{mlp}.gate.e_score_correction_bias"] = (E,)
        shapes |= feed_forward(f"{mlp}.shared_experts", D, F * int(str(sizes.config["n_shared_experts"])))
    for expert in range(E):
        shapes |= feed_forward(f"{mlp}.experts.{expert}", D, F)
    return shapes


def shards(sizes: Sizes) -> Iterator[Shapes]:
    yield from (layer(sizes, index) for index in range(sizes.layers))
    yield {"model.embed_tokens.weight": (V, sizes.D), "model.norm.weight": (sizes.D,)}


def write_folder(sizes: Sizes, folder: Path, tokenizer: Path) -> None:
    """A folder in bf16: a shard a layer, one for the tied embeddings."""
    folder.mkdir()
    weight_map = {}
    for number, shapes in enumerate(shards(sizes), start=1):
        name = f"model-{number:05}-of-{sizes.layers + 1:05}.safetensors"
        write_shard(folder / name, shapes, seed=number)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": sizes.kind, "hidden_size": sizes.D, "num_hidden_layers": sizes.layers, "vocab_size": V,
              "num_attention_heads": sizes.H, "num_key_value_heads": sizes.G, "num_experts_per_tok": sizes.K,
              "moe_intermediate_size": sizes.F, "intermediate_size": sizes.F, "max_position_embeddings": 32768,
              "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True}  # fmt: skip
    if sizes.kind != "deepseek_v3":
        config["head_dim"] = sizes.head_dim
    (folder / "config.json").write_text(json.dumps(config | sizes.config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)


def main() -> int:
    """Convert each family; 1 where one took more memory than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("bf16", "f16"))
    parser.add_argument("--directory", type=Path, help="where to put the files (default: the temporary one)")
    arguments = parser.parse_args()
    say_row(["family", "file GB", "seconds", "RssAnon MB"])
    peaks = []
    for family in arguments.families or FAMILIES:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            source, target = Path(scratch) / "hf", Path(scratch) / "out.gguf"
            write_folder(FAMILIES[family], source, arguments.tokenizer)
            options = ["--dtype", arguments.dtype] if arguments.dtype else []
            usage = run_measured([sys.executable, "-m", "fiddler", "convert", source, target, *options])
            gigabytes = target.stat().st_size / 1e9
        say_row([family, f"{gigabytes:.2f}", f"{usage.seconds:.1f}", f"{usage.peak / 1e6:.0f}"])
        peaks.append(usage.peak)
    return int(max(peaks) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

"""Write a GGUF with random weights in the shape of a real model, at any depth: for measurements.

    python tests/tools/random_model.py qwen3-30b-a3b OUT.gguf --vocabulary ANY.gguf --layers 4

Weights come from one pool of normal numbers, block by block, so a file is written as fast as the disk takes it.
`--vocabulary`: a GGUF whose tokenizer the model gets, such as those in llama.cpp's `models/`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

from fiddler.converters.mixtures import MIXTURES, Mixture, tensor_type
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.models import ARCHITECTURES, LLAMA
from fiddler.models.architecture import FLOATS, Role, RouterRule, Scoring
from fiddler.models.config import Config, LatentWidths
from fiddler.models.metadata import to_metadata
from fiddler.models.rope_scaling import RopeKind, RopeScaling


def _shape(name: str, vocabulary: int, context: int, width: int, layers: int, hidden: int, heads: int, kv_heads: int,
           head_dim: int, experts: int, used: int, **others: object) -> Config:  # fmt: skip
    architecture = ARCHITECTURES[name]
    others = {"router": architecture.router, **others}
    return Config(architecture, vocabulary, context, width, layers, hidden, heads, kv_heads, head_dim, experts, used,
                  1e-6, 1e6, **others)  # type: ignore[arg-type]  # fmt: skip


def _dense(vocabulary: int, context: int, width: int, layers: int, hidden: int, heads: int, kv_heads: int,
           base: float, **others: object) -> Config:  # fmt: skip
    return Config(LLAMA, vocabulary, context, width, layers, 0, heads, kv_heads, width // heads, 0, 0, 1e-5, base,
                  feed_forward_length=hidden, leading_dense_block_count=layers, **others)  # type: ignore[arg-type]  # fmt: skip


SHAPES = {
    "llama-3-8b": _dense(128256, 8192, 4096, 32, 14336, 32, 8, 5e5),
    "mistral-7b": _dense(32000, 32768, 4096, 32, 14336, 32, 8, 1e4, sliding_window=4096),
    "tinyllama-1.1b": _dense(32000, 2048, 2048, 22, 5632, 32, 4, 1e4),
    "mixtral-8x7b": _shape("llama", 32000, 32768, 4096, 32, 14336, 32, 8, 128, 8, 2),
    "qwen3-30b-a3b": _shape("qwen3moe", 151936, 40960, 2048, 48, 768, 32, 4, 128, 128, 8),
    "qwen1.5-moe-a2.7b": _shape("qwen2moe", 151936, 8192, 2048, 24, 1408, 16, 16, 128, 60, 4,
                                expert_shared_feed_forward_length=5632),
    "olmoe-1b-7b": _shape("olmoe", 50304, 4096, 2048, 16, 1024, 16, 16, 128, 64, 8),
    "granite-3b-a800m": _shape("granitemoe", 49155, 4096, 1536, 32, 512, 24, 8, 64, 40, 8, attention_scale=0.015625,
                               embedding_scale=12.0, residual_scale=0.22, logit_scale=6.0,
                               absent=frozenset((Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN))),
    "deepseek-moe-16b": _shape("deepseek", 102400, 4096, 2048, 28, 1408, 16, 16, 128, 64, 6, feed_forward_length=10944,
                               leading_dense_block_count=1, expert_shared_feed_forward_length=2816),
    "deepseek-v2-lite": _shape("deepseek2", 102400, 163840, 2048, 27, 1408, 16, 1, 576, 64, 6,
                               feed_forward_length=10944, leading_dense_block_count=1,
                               expert_shared_feed_forward_length=2816, rope_dimension_count=64,
                               latent=LatentWidths(latent=512, key=192, value=128),
                               rope_scaling=RopeScaling(RopeKind.YARN, 40.0, 4096, log_multiplier=0.707),
                               absent=frozenset((Role.QUERY_DOWN, Role.QUERY_DOWN_NORM, Role.QUERY_UP,
                                                 Role.KEY_VALUE_UP, Role.SELECTION_BIAS))),
    "glm-4.5-air": _shape("glm4moe", 151552, 131072, 4096, 46, 1408, 96, 8, 128, 128, 8, feed_forward_length=10944,
                          leading_dense_block_count=1, expert_shared_feed_forward_length=1408, rope_dimension_count=64,
                          router=RouterRule(Scoring.SIGMOID), absent=frozenset((Role.QUERY_NORM, Role.KEY_NORM))),
    "gpt-oss-20b": _shape("gpt-oss", 201088, 131072, 2880, 24, 2880, 64, 8, 64, 32, 4, sliding_window=128,
                          rope_scaling=RopeScaling(RopeKind.YARN, 32.0, 4096, 1.3465735902799727, truncate=False)),
    "dbrx": _shape("dbrx", 100352, 32768, 6144, 40, 10752, 48, 8, 128, 16, 4, clamp_kqv=8.0),
}  # fmt: skip
ALIGNMENT = 64


def write_random_model(
    path: Path,
    config: Config,
    vocabulary: Path,
    dtype: str = "bf16",
    *,
    mixture: Mixture | None = None,
    seed: int = 7,
    metadata: Mapping[str, object] = MappingProxyType({}),
    shapes: Mapping[str, tuple[int, ...] | None] = MappingProxyType({}),
) -> None:
    """Write the model; its vocabulary's size is that of `vocabulary`.

    mixture: of quantised types, in place of `dtype`.
    metadata: values in place of those that `config` implies, or beside them, without the architecture's prefix.
    shapes: shapes of tensors in place of those that `config` implies, or of more tensors; None: the tensor is left out.
    """
    reader = gguf.GGUFReader(vocabulary)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    config = replace(config, vocab_size=len(tokens.data))
    tensors = {name: (tensor.role, config.shape(tensor)) for name, tensor in config.tensors(tied=False).items()}
    for name, shape in shapes.items():
        role, _ = tensors.pop(name, (Role.QUERY, ()))
        if shape is not None:
            tensors[name] = role, shape
    writer = gguf.GGUFWriter(path, config.architecture.gguf_name)
    writer.add_name(f"random {config.architecture.name}, {config.block_count} layers")
    writer.add_file_type(mixture.file_type if mixture else {"bf16": 32, "f16": 1, "f32": 0}[dtype])
    writer.add_custom_alignment(ALIGNMENT)
    prefix = config.architecture.gguf_name
    for key, value in (to_metadata(config) | {f"{prefix}.{key}": value for key, value in metadata.items()}).items():
        kind = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        kind[str] = gguf.GGUFValueType.STRING
        writer.add_key_value(key, value, kind[type(value)])
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    kinds = {}
    for name, (role, shape) in tensors.items():
        kinds[name] = "f32" if role in FLOATS else dtype
        if mixture and role not in FLOATS:
            kinds[name] = tensor_type(mixture, name, shape, config, tied=False)
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        length, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.uint16), math.prod(shape) // length * nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    random = np.random.default_rng(seed)
    largest = max(math.prod(shape) for _, shape in tensors.values())
    pool = random.standard_normal(min(1 << 25, largest + 4096), dtype=np.float32) * np.float32(0.02)
    pools = {"f32": pool, "f16": pool.astype(np.float16), "bf16": (pool.view(np.uint32) >> 16).astype(np.uint16)}
    for kind in set(kinds.values()) & BLOCK_FORMATS.keys():  # whole blocks, as wide as one of them
        blocks = BLOCK_FORMATS[kind].encode(pool[: 1 << 20]).view(f"V{BLOCK_FORMATS[kind].block_bytes}")
        pools[kind] = np.tile(blocks, 16)
    for file in writer.fout:
        file.write(bytes(-file.tell() % ALIGNMENT))
        for index, (name, (role, shape)) in enumerate(tensors.items()):
            values = pools[kinds[name]]
            left = math.prod(shape)
            if kinds[name] in BLOCK_FORMATS:
                left //= BLOCK_FORMATS[kinds[name]].block_length
            if role in FLOATS:
                is_norm = role.name.endswith("NORM")
                file.write((np.ones(left) if is_norm else random.standard_normal(left)).astype(np.float32).tobytes())
                left = 0
            begin = index * 7919 % 4096
            while left:
                count = min(left, values.size - begin)
                file.write(memoryview(values[begin : begin + count]).cast("B"))
                left, begin = left - count, 0
            file.write(bytes(-file.tell() % ALIGNMENT))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16")
    parser.add_argument("--type", choices=MIXTURES, help="a mixture of quantised types, in place of --dtype")
    options = parser.parse_args()
    config = SHAPES[options.shape]
    if options.layers:
        dense = config.leading_dense_block_count if config.architecture.has_experts else options.layers
        config = replace(config, block_count=options.layers, leading_dense_block_count=dense)
    began = time.perf_counter()
    mixture = MIXTURES[options.type] if options.type else None
    write_random_model(options.out, config, options.vocabulary, options.dtype, mixture=mixture)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()

"""A small Mixtral GGUF with random weights and a real vocabulary, written by the `gguf` package alone.

It uses nothing of fiddler: our reader is tested against another writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import sentencepiece
import torch
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

VOCABULARY = Path(__file__).parents[1] / "data" / "tiny" / "tokenizer.model"


def write_random_mixtral(
    path: Path,
    *,
    layers: int = 2,
    d: int = 64,
    f: int = 96,
    experts: int = 4,
    used: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    context: int = 1024,
    window: int | None = None,
    tied: bool = False,
    add_bos: bool = True,
    eos: int | None = None,
    dtype: Literal["bf16", "f16", "f32"] = "bf16",
    dense_dtype: Literal["bf16", "f16", "f32"] | None = None,
    vocabulary: Path = VOCABULARY,
    control: Mapping[int, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write the model to `path` and return it; the same arguments give the same bytes.

    Matrices have the variance 1 / columns, so that activations keep their size through the layers; queries and
    keys are larger, so that attention prefers some positions, and the output, so that some tokens are probable.
    `eos`: the end token, by default the vocabulary's. `dtype`: of the experts; `dense_dtype`: of all other matrices,
    by default the same. Norms and routers: float32. control: names of ids that are control tokens.
    """
    random = np.random.default_rng(seed)
    head_dim = head_dim or d // heads
    dense = dense_dtype or dtype
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random-mixtral-{layers}x{d}")
    writer.add_file_type({"bf16": 32, "f16": 1, "f32": 0}[dtype])
    writer.add_vocab_size(pieces.vocab_size())
    writer.add_context_length(context)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(f)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(used)
    if window is not None:
        writer.add_sliding_window(window)
    _add_vocabulary(writer, pieces, add_bos, pieces.eos_id() if eos is None else eos, control or {})

    def matrix(name: str, *shape: int, kind: str = dense, scale: float = 1.0) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * (scale / shape[-1] ** 0.5)
        _add(writer, name, values, kind)

    def norm(name: str) -> None:
        _add(writer, name, random.uniform(0.5, 1.5, d).astype(np.float32), "f32")

    matrix("token_embd.weight", pieces.vocab_size(), d, scale=4.0 if tied else 1.0)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        matrix(f"{block}.attn_q.weight", heads * head_dim, d, scale=2.0)
        matrix(f"{block}.attn_k.weight", kv_heads * head_dim, d, scale=2.0)
        matrix(f"{block}.attn_v.weight", kv_heads * head_dim, d)
        matrix(f"{block}.attn_output.weight", d, heads * head_dim)
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.ffn_gate_inp.weight", experts, d, kind="f32")
        matrix(f"{block}.ffn_gate_exps.weight", experts, f, d, kind=dtype)
        matrix(f"{block}.ffn_up_exps.weight", experts, f, d, kind=dtype)
        matrix(f"{block}.ffn_down_exps.weight", experts, d, f, kind=dtype)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", pieces.vocab_size(), d, scale=4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_template(source: Path, target: Path, template: str) -> Path:
    """Write a copy of a model to `target`, with a chat template, and return it."""
    reader, key = gguf.GGUFReader(source), gguf.Keys.Tokenizer.CHAT_TEMPLATE
    new = {key: MetadataDetails(gguf.GGUFValueType.STRING, template)}
    copy_with_new_metadata(reader, gguf.GGUFWriter(target, "llama"), new, [])
    return target


def with_context(source: Path, target: Path, context: int) -> Path:
    """Write a copy of a GGUF to `target` with another context length, and return it."""
    shutil.copyfile(source, target)
    reader = gguf.GGUFReader(target, "r+")
    field = reader.fields["llama.context_length"]
    field.parts[field.data[0]][0] = context
    reader.data.flush()
    return target


def _add_vocabulary(
    writer: gguf.GGUFWriter,
    pieces: sentencepiece.SentencePieceProcessor,
    add_bos: bool,
    eos: int,
    control: Mapping[int, str],
) -> None:
    ids = range(pieces.vocab_size())
    types = gguf.TokenType

    def kind(index: int) -> int:
        if pieces.is_control(index) or index in control:
            return types.CONTROL
        if pieces.is_unknown(index):
            return types.UNKNOWN
        return types.BYTE if pieces.is_byte(index) else types.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([control.get(index, pieces.id_to_piece(index)).encode() for index in ids])
    writer.add_token_scores([pieces.get_score(index) for index in ids])
    writer.add_token_types([int(kind(index)) for index in ids])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    if kind == "bf16":
        bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, values.astype({"f16": np.float16, "f32": np.float32}[kind]))

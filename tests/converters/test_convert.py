"""Conversion of transformers' own checkpoints: every tensor, bit by bit, and the metadata."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

import fiddler.converters
from fiddler.converters.conversion import convert
from fiddler.converters.row_order import interleave
from fiddler.models.config import Config
from fiddler.models.metadata import read_config
from fiddler.models.mixtral import MIXTRAL

TINY = Path(__file__).parents[1] / "data" / "tiny"
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
KINDS = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A random Mixtral; letters as in `fiddler.models.config`."""

    D: int = 32
    F: int = 96
    L: int = 1
    H: int = 4
    G: int = 2
    E: int = 4
    K: int = 2
    head_dim: int | None = None
    window: int | None = None
    theta: float = 1e6
    tied: bool = False
    stored: str = "bf16"
    wanted: str | None = None
    fused: bool = False
    shard: str = "1GB"


CASES = {
    "plain": Case(),
    "odd width": Case(D=40, F=24, H=5, G=5, E=3, L=2),
    "one KV head": Case(H=4, G=1, E=8, shard="40KB"),
    "wide heads": Case(D=24, H=3, G=1, head_dim=16, theta=1e4, E=3),
    "narrow heads": Case(D=64, H=8, G=8, head_dim=2, L=3),
    "eight heads a group": Case(D=48, H=8, G=1, E=16, K=4, F=16),
    "tied": Case(tied=True, E=3, K=1),
    "window": Case(window=8),
    "fused": Case(fused=True, L=2, F=33, E=3, shard="30KB"),
    "fused tied f16": Case(fused=True, tied=True, stored="f16", E=3, K=3),
    "f16": Case(stored="f16"),
    "f32": Case(stored="f32"),
    "f32 to f16": Case(stored="f32", wanted="f16", fused=True),
    "bf16 to f16": Case(wanted="f16", shard="40KB"),
    "f16 to bf16": Case(stored="f16", wanted="bf16"),
    "same said": Case(wanted="bf16", L=2, E=8, head_dim=8),
}


def make_checkpoint(case: Case, folder: Path) -> None:
    """A random model that transformers itself saves, with the tokenizer of the tiny fixture."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=case.D,
        intermediate_size=case.F,
        num_hidden_layers=case.L,
        num_attention_heads=case.H,
        num_key_value_heads=case.G,
        head_dim=case.head_dim,
        num_local_experts=case.E,
        num_experts_per_tok=case.K,
        max_position_embeddings=64,
        sliding_window=case.window,
        rope_parameters={"rope_theta": case.theta, "rope_type": "default"},
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    folder.mkdir()
    model.to(TORCH[case.stored]).save_pretrained(folder, max_shard_size=case.shard, save_original_format=not case.fused)
    shutil.copy(TINY / "tokenizer.model", folder)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def expected_tensors(tensors: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """The tensors that the GGUF must hold, with q and k in transformers' order: the obvious way, all at once."""
    expected = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
    }
    if not case.tied:
        expected["output.weight"] = tensors["lm_head.weight"]
    for index in range(case.L):
        layer, blk = f"model.layers.{index}", f"blk.{index}"
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            expected[f"{blk}.attn_{ours}.weight"] = tensors[f"{layer}.self_attn.{theirs}_proj.weight"]
        expected[f"{blk}.attn_norm.weight"] = tensors[f"{layer}.input_layernorm.weight"]
        expected[f"{blk}.ffn_norm.weight"] = tensors[f"{layer}.post_attention_layernorm.weight"]
        if case.fused:
            expected[f"{blk}.ffn_gate_inp.weight"] = tensors[f"{layer}.mlp.gate.weight"]
            both = tensors[f"{layer}.mlp.experts.gate_up_proj"]
            gate, up = both.chunk(2, dim=1)
            down = tensors[f"{layer}.mlp.experts.down_proj"]
        else:
            moe = f"{layer}.block_sparse_moe"
            expected[f"{blk}.ffn_gate_inp.weight"] = tensors[f"{moe}.gate.weight"]
            gate, down, up = (
                torch.stack([tensors[f"{moe}.experts.{expert}.w{n}.weight"] for expert in range(case.E)])
                for n in (1, 2, 3)
            )
        expected[f"{blk}.ffn_gate_exps.weight"] = gate
        expected[f"{blk}.ffn_up_exps.weight"] = up
        expected[f"{blk}.ffn_down_exps.weight"] = down
    return expected


def naive_half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the interleaving, row by row: neighbours go to the two halves of their head."""
    back = torch.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for pair in range(size // 2):
            back[head * size + pair] = rows[head * size + 2 * pair]
            back[head * size + size // 2 + pair] = rows[head * size + 2 * pair + 1]
    return back


def read_tensors(path: Path) -> dict[str, tuple[gguf.GGMLQuantizationType, torch.Tensor]]:
    """Name -> (type, tensor), bit for bit, in the file's order, as the gguf package reads them."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        raw = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1).copy())
        torch_type = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        tensors[tensor.name] = tensor.tensor_type, raw.view(torch_type[tensor.tensor_type.name]).view(shape)
    return tensors


def metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_tensor_of_a_checkpoint_is_converted_bit_by_bit(case, tmp_path):
    make_checkpoint(case, tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (case.shard != "1GB")
    report = convert(tmp_path / "hf", tmp_path / "out.gguf", case.wanted)
    dtype = case.wanted or {"bf16": "bf16", "f16": "f16", "f32": "bf16"}[case.stored]

    written = read_tensors(tmp_path / "out.gguf")
    expected = expected_tensors(stored_tensors(tmp_path / "hf"), case)
    for name, tensor in expected.items():
        kind, converted = written.pop(name)
        if tensor.ndim == 1 or "ffn_gate_inp" in name:
            assert kind == gguf.GGMLQuantizationType.F32
            assert same_bits(converted, tensor.float()), name
        else:
            assert kind == KINDS[dtype]
            heads = {"attn_q.weight": case.H, "attn_k.weight": case.G}.get(name.partition(".")[2][2:], 0)
            if heads:
                converted = naive_half_split(converted, heads)
            assert same_bits(converted, tensor.to(TORCH[dtype])), name
    assert not written

    fields = metadata(tmp_path / "out.gguf")
    head_dim = case.head_dim or case.D // case.H
    assert read_config(fields, ()) == Config(
        MIXTRAL, 512, 64, case.D, case.L, case.F, case.H, case.G, head_dim, case.E, case.K,
        rms_epsilon=float(np.float32(1e-5)), rope_freq_base=case.theta, sliding_window=case.window,
    )  # fmt: skip
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "hf"
    assert fields["general.file_type"] == {"f16": 1, "bf16": 32}[dtype]
    assert fields["general.alignment"] == 64
    assert len(fields["tokenizer.ggml.tokens"]) == 512
    assert report.dtype == dtype
    assert report.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert report.tensors == len(expected)
    assert report.overflowed == 0
    assert [warning for warning in report.warnings if "llama.cpp" in warning] == (
        [f"llama.cpp ignores sliding_window {case.window} for this architecture: its output will differ "
         f"from position {case.window} on"] if case.window else []
    )  # fmt: skip


@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_weights_of_any_bits_survive_conversion(stored, tmp_path):
    """NaNs of every payload, infinities, subnormals, negative zeros: random bytes for weights."""
    source = shutil.copytree(TINY, tmp_path / "hf")
    raw = (source / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[:start].replace(b'"BF16"', b'"F16" ' if stored == "F16" else b'"BF16"')
    noise = np.random.default_rng(1).integers(0, 256, len(raw) - start, np.uint8).tobytes()
    (source / "model.safetensors").write_bytes(header + noise)
    report = convert(source, tmp_path / "out.gguf")
    assert report.dtype == stored.lower()
    case = Case(D=64, L=2)
    written = read_tensors(tmp_path / "out.gguf")
    for name, tensor in expected_tensors(load((source / "model.safetensors").read_bytes()), case).items():
        _, converted = written[name]
        if converted.dtype != torch.float32:
            heads = {"attn_q.weight": case.H, "attn_k.weight": case.G}.get(name.partition(".")[2][2:], 0)
            assert same_bits(naive_half_split(converted, heads) if heads else converted, tensor), name


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (4, 6), (3, 16)])
def test_interleaved_rows_rotate_as_transformers_rotates(heads, head_dim):
    """q . k under ggml's rotation of neighbours is q . k under transformers' rotation of halves."""
    D, position, key_position = 10, 7, 3
    generator = torch.Generator().manual_seed(1)
    wq, wk = (torch.randn(heads * head_dim, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = (torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def halves(w, x, position):
        angles = torch.cat([frequencies, frequencies]) * position
        q = (w @ x).view(1, heads, 1, head_dim)
        rotated, _ = apply_rotary_pos_emb(q, q, angles.cos()[None, None], angles.sin()[None, None])
        return rotated.view(heads, head_dim)

    def neighbours(w, x, position):
        q = (torch.from_numpy(interleave(w.numpy(), head_dim)) @ x).view(heads, head_dim // 2, 2)
        rotation = torch.polar(torch.ones_like(frequencies), frequencies * position)
        rotated = torch.view_as_complex(q.contiguous()) * rotation
        return torch.view_as_real(rotated).view(heads, head_dim)

    expected = (halves(wq, x, position) * halves(wk, y, key_position)).sum(-1)
    actual = (neighbours(wq, x, position) * neighbours(wk, y, key_position)).sum(-1)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=0)
    naive = naive_half_split(torch.from_numpy(interleave(wq.numpy(), head_dim)), heads)
    assert torch.equal(naive, wq)


def test_the_size_of_the_pieces_does_not_change_the_file(tmp_path, monkeypatch):
    """Tensors converted whole or row by row give the same file."""
    convert(TINY, tmp_path / "whole.gguf", "f16")
    monkeypatch.setattr("fiddler.converters.tensor_data._PIECE", 100)
    convert(TINY, tmp_path / "rows.gguf", "f16")
    assert (tmp_path / "rows.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_weights_that_overflow_or_become_zero_are_counted_and_warned_of(tmp_path):
    source = shutil.copytree(TINY, tmp_path / "hf")
    weights = load((source / "model.safetensors").read_bytes())
    weights["model.layers.0.self_attn.q_proj.weight"][3, :5] = 1e6
    weights["lm_head.weight"][:, :] = 1.0
    weights["lm_head.weight"][-1, -7:] = 1e-20
    weights["model.layers.1.block_sparse_moe.gate.weight"][0, 0] = 1e30  # float32 holds it
    save_file(weights, source / "model.safetensors")
    report = convert(source, tmp_path / "out.gguf", "f16")
    assert (report.overflowed, report.flushed) == (5, 7)
    assert report.warnings == (
        "3 weights of the source have no exact value in f16; they were rounded",
        "5 weights are too large for f16 and became infinite; convert with dtype bf16",
        "7 weights are too small for f16 and became zero",
    )
    assert convert(source, tmp_path / "bf16.gguf").warnings == ()


def test_progress_only_grows_and_ends_at_the_bytes_of_all_tensors(tmp_path):
    calls: list[tuple[int, int]] = []
    convert(TINY, tmp_path / "out.gguf", progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert done[-1] == calls[0][1] == sum(tensor.n_bytes for tensor in tensors)
    assert len({total for _, total in calls}) == 1


def test_importing_the_package_imports_neither_gguf_nor_numpy():
    assert fiddler.converters.convert is convert
    code = "import sys, fiddler.converters; sys.exit('gguf' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

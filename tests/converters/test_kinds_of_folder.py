"""The kinds of folder that users have: each converts to transformers' logits, or one line names cause and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer as FastTokenizer, decoders, models, pre_tokenizers
from transformers import MixtralForCausalLM

import fiddler
from fiddler.converters import convert
from fiddler.converters.pytorch_file import loads_safely
from fiddler.errors import FiddlerError
from oracles.byte_level import trained
from oracles.reference import Reference, Shape, make_checkpoint

Kind = Callable[[Path], object]
SHAPE = Shape(D=32, F=48, L=1, H=4, G=2, E=4, K=2)
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
IDS = [1, 17, 300, 5, 44, 9]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(SHAPE, tmp_path_factory.mktemp("plain") / "hf")


def config(**values):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | values
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def put(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def renamed(name, new):
    return lambda folder: (folder / name).rename(folder / new)


def only(*names):
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names]


def tensors(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS)
        changed = change(weights) or weights
        save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


without_output = tensors(lambda weights: {name: weights[name] for name in weights if name != "lm_head.weight"})


def as_bin(folder, **options):
    if not loads_safely(torch.__version__):
        pytest.skip("this torch reads no .bin")
    torch.save(load_file(folder / WEIGHTS), folder / BIN, **options)
    (folder / WEIGHTS).unlink()


def sharded(suffix, *, index=True):
    def apply(folder):
        if suffix == "bin" and index and not loads_safely(torch.__version__):
            pytest.skip("this torch reads no .bin")
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        stem, names, weight_map = ("model", "pytorch_model")[suffix == "bin"], sorted(weights), {}
        for number, part in enumerate((names[:9], names[9:]), 1):
            name = f"{stem}-{number:05}-of-00002.{suffix}"
            content = {key: weights[key] for key in part}
            if suffix == "bin":
                torch.save(content, folder / name)
            else:
                save_file(content, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        if index:
            put(f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})(folder)

    return apply


def saved_by(**options):
    """Saved again by transformers, so that it writes its own form."""

    def apply(folder):
        model = MixtralForCausalLM.from_pretrained(folder, dtype=options.pop("dtype", torch.bfloat16))
        model.save_pretrained(folder, **options)

    return apply


def tied(folder):
    config(tie_word_embeddings=True)(folder)
    without_output(folder)


def hub_cache(ref=True, snapshots=1):
    def apply(folder):
        files = list(folder.iterdir())
        for number in range(snapshots):
            snapshot = folder / "snapshots" / f"{number:040x}"
            snapshot.mkdir(parents=True)
            for path in files:
                shutil.copy(path, snapshot)
        for path in files:
            path.unlink()
        if ref:
            put("refs/main", (f"{0:040x}" if ref is True else ref).encode())(folder)

    return apply


def byte_level(folder):
    (folder / "tokenizer.model").unlink()
    tokenizer = FastTokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("abĠ")}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.pre_tokenizer.add_prefix_space = False
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_level_bpe(folder):
    (folder / "tokenizer.model").unlink()
    added = [AddedToken("</s>", special=True)]
    trained("qwen2", added, nfc=True, size=500).save(str(folder / "tokenizer.json"))


def pickled(folder):
    as_bin(folder)
    torch.save({"a": shutil.rmtree}, folder / BIN)


def gptq(weights):
    name = next(name for name in weights if name.endswith("w1.weight"))
    weights[name.replace("weight", "qweight")] = weights.pop(name).to(torch.int32)


def quantised(method, **more):
    return config(quantization_config={"quant_method": method} | more)


CONVERTS: dict[str, Kind] = {
    "plain": lambda folder: None,
    "shards": sharded("safetensors"),
    "PyTorch .bin": as_bin,
    "PyTorch .bin of the oldest format": lambda folder: as_bin(folder, _use_new_zipfile_serialization=False),
    "PyTorch .bin in shards": sharded("bin"),
    "byte-level BPE": byte_level_bpe,
    ".bin beside safetensors": put(BIN, b"not read"),
    "fused experts": saved_by(save_original_format=False),
    "experts by themselves": saved_by(save_original_format=True),
    "float32": saved_by(dtype=torch.float32),
    "float16": saved_by(dtype=torch.float16),
    "float32 .bin": both(saved_by(dtype=torch.float32), as_bin),
    "float16 .bin": both(saved_by(dtype=torch.float16), as_bin),
    "tied": tied,
    "tied .bin": both(tied, as_bin),
    "a hub cache": hub_cache(),
    "a hub cache without refs": hub_cache(ref=False),
    "a hub cache of two snapshots": hub_cache(snapshots=2),
    "linear RoPE of factor 1": config(rope_parameters={"rope_type": "linear", "factor": 1.0, "rope_theta": 1e6}),
    "the older key, factor 1": config(
        rope_parameters=..., rope_theta=1e6, rope_scaling={"type": "linear", "factor": 1.0}
    ),
    "yarn": config(head_dim=8, rope_parameters=YARN | {"factor": 4.0}),
    "yarn, the older key": config(
        head_dim=8, rope_parameters=..., rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0}
    ),
    "llama3": config(head_dim=8, rope_parameters=YARN | LLAMA3 | {"factor": 8.0}),
    "null RoPE": config(rope_parameters=..., rope_theta=1e6, rope_scaling=None),
    "yarn of factor 1": config(head_dim=8, rope_parameters=YARN | {"factor": 1.0}),
    "llama3 of factor 1": config(head_dim=8, rope_parameters=YARN | LLAMA3 | {"factor": 1.0}),
    "no tokenizer_config": without("tokenizer_config.json"),
    "Mistral's own files beside": both(put("params.json", {"dim": 32}), put("consolidated.safetensors", b"not read")),
    "no generation_config": lambda folder: (folder / "generation_config.json").unlink(missing_ok=True),
    "a README pointer": put("README.md", POINTER),
}

LFS = "is a Git LFS pointer, not the file itself; run `git lfs pull`"
REFUSED: dict[str, tuple[Kind, str]] = {
    "empty": (only(), "config.json is missing; give the folder"),
    "no config": (without("config.json"), "config.json is missing"),
    "config alone": (only("config.json"), "nor pytorch_model.bin; download the whole checkpoint"),
    "weights alone": (only(WEIGHTS), "config.json is missing"),
    "no weights": (without(WEIGHTS), "download the whole checkpoint"),
    "no tokenizer": (without("tokenizer.model"), "holds neither tokenizer.model nor tokenizer.json; download one"),
    "shards without an index": (sharded("safetensors", index=False), "but model.safetensors.index.json is missing"),
    ".bin shards without an index": (sharded("bin", index=False), "but pytorch_model.bin.index.json is missing"),
    "a shard missing": (
        both(sharded("safetensors"), without("model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors is missing; download the whole checkpoint",
    ),
    "a .bin shard missing": (
        both(sharded("bin"), without("pytorch_model-00002-of-00002.bin")),
        "pytorch_model-00002-of-00002.bin is missing; download the whole checkpoint",
    ),
    "a .bin cut": (both(as_bin, lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:999])), "did not finish"),
    "an empty .bin": (both(as_bin, put(BIN, b"")), "is empty; download it again"),
    "a .bin of code": (pickled, "does not load safely as PyTorch weights"),
    "a .bin of no tensors": (both(as_bin, lambda f: torch.save({"a": 1}, f / BIN)), "'a' is 'int', not a tensor"),
    "a .bin of a list": (both(as_bin, lambda f: torch.save([1], f / BIN)), "it must be tensors by name"),
    "a trainer's .pt": (renamed(WEIGHTS, "weights.pt"), "weights.pt holds weights under a name"),
    "weights under another name": (renamed(WEIGHTS, "mixtral.safetensors"), "mixtral.safetensors holds weights under"),
    "GGUF in the folder": (both(only(), put("mixtral.gguf", b"GGUF")), "give mixtral.gguf itself to `fiddler run`"),
    "a folder around it": (
        lambda f: [shutil.copytree(f, f / "inner"), only("inner")(f)],
        "but its folder inner has; give that one",
    ),
    "a LoRA adapter": (
        both(only(), put("adapter_config.json", {"base_model_name_or_path": "m/x"}), put("adapter_model.bin", b"x")),
        "is a LoRA adapter of 'm/x' (adapter_config.json), not a whole model; merge it with peft",
    ),
    "a LoRA adapter with config.json": (
        both(without(WEIGHTS), put("adapter_config.json", {"base_model_name_or_path": "m/x"})),
        "is a LoRA adapter of 'm/x'",
    ),
    "Mistral's own format": (
        both(only(WEIGHTS), renamed(WEIGHTS, "consolidated.safetensors"), put("params.json", {"dim": 32})),
        "is in Mistral's own format (params.json, no config.json)",
    ),
    "Mistral's own weights": (renamed(WEIGHTS, "consolidated.safetensors"), "in Mistral's own format"),
    "ONNX": (renamed(WEIGHTS, "model.onnx"), "as ONNX"),
    "TensorFlow": (renamed(WEIGHTS, "tf_model.h5"), "for TensorFlow"),
    "Flax": (renamed(WEIGHTS, "flax_model.msgpack"), "for Flax"),
    "a hub cache with a stale ref": (hub_cache(ref="f" * 40), "which is not there; download it again"),
    "a hub cache without refs, of two": (hub_cache(ref=False, snapshots=2), "2 snapshots and no refs/main"),
    "tekken.json": (
        both(without("tokenizer.model"), put("tekken.json", {})),
        "tekken.json is Mistral's own format, which is not read",
    ),
    "a byte-level BPE of three letters": (byte_level, "lacks 237 of the 256 bytes, 0x00 among them"),
    "vocab.json and merges.txt": (
        both(without("tokenizer.model"), put("vocab.json", {}), put("merges.txt", b"")),
        "vocab.json is half of a byte-level tokenizer and not read",
    ),
    "tokenizer.model.v3": (renamed("tokenizer.model", "tokenizer.model.v3"), "rename it to tokenizer.model"),
    "tokenizer.model of tiktoken": (put("tokenizer.model", b"IQ== 0\nIg== 1\n"), "is not a SentencePiece model"),
    "a tokenizer too large": (config(vocab_size=300), "has shape [512, 32], but config.json implies [300, 32]"),
    "GPTQ": (quantised("gptq", bits=4), "quantization_config: 'gptq'"),
    "AWQ": (quantised("awq", bits=4), "quantization_config: 'awq'"),
    "FP8": (quantised("fp8"), "quantization_config: 'fp8'"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "quantization_config: 'bitsandbytes'"),
    "compressed-tensors": (quantised("compressed-tensors"), "quantization_config: 'compressed-tensors'"),
    "an old GPTQ": (put("quantize_config.json", {"bits": 4}), "quantization_config: 'quantize_config.json'"),
    "GPTQ that says nothing": (tensors(gptq), "qweight' belongs to quantised weights"),
    "FP8 that says nothing": (
        tensors(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)})),
        "model.norm.weight is F8_E4M3, a quantised or unusual type",
    ),
    "float64": (
        tensors(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].double()})),
        "model.norm.weight is F64",
    ),
    "float64 .bin": (
        both(tensors(lambda w: w.update({"lm_head.weight": w["lm_head.weight"].double()})), as_bin),
        "lm_head.weight is F64",
    ),
    **{
        name: (config(model_type=kind, architectures=[name]), f"model_type is '{kind}'; only 'mixtral', 'qwen3_moe'")
        for name, kind in (
            *(("Qwen3ForCausalLM", "qwen3"), ("Mistral3ForCausalLM", "mistral3"), ("JetMoeForCausalLM", "jetmoe")),
            *(("Gemma4ForCausalLM", "gemma4"), ("NllbMoeForConditionalGeneration", "nllb-moe"), ("BertModel", "bert")),
            *(("PhimoeForCausalLM", "phimoe"),),
        )
    },
    "no model_type": (config(model_type=...), "model_type is None (architectures: ['MixtralForCausalLM'])"),
    "longrope": (config(rope_parameters=YARN | {"rope_type": "longrope"}), "rope_type is 'longrope'"),
    "dynamic of factor 1": (
        config(rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e6}),
        "rope_type is 'dynamic'",
    ),
    "another width": (config(hidden_size=64), "but config.json implies [512, 64]"),
    "another expert width": (config(intermediate_size=64), "but config.json implies [64, 32]"),
    "more experts": (config(num_local_experts=8), "but config.json implies [8, 32]"),
    "more layers": (config(num_hidden_layers=2), "model.layers.1"),
    "tied, and the output missing": (without_output, "lm_head.weight is missing"),
    **{
        f"a pointer for {name}": (put(name, POINTER), f"{name} {LFS}")
        for name in ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
    },
    "a pointer for a .bin": (both(as_bin, put(BIN, POINTER)), f"{BIN} {LFS}"),
    "a pointer for a shard": (
        both(sharded("safetensors"), put("model-00002-of-00002.safetensors", POINTER)),
        f"model-00002-of-00002.safetensors {LFS}",
    ),
}


def test_there_are_as_many_kinds_as_were_met():
    assert len(CONVERTS) + len(REFUSED) >= 71


def snapshot(folder):
    found = sorted(folder.glob("snapshots/*"))
    return found[0] if found else folder


@pytest.mark.filterwarnings("ignore")  # transformers' own, of the older keys
@pytest.mark.parametrize("kind", CONVERTS)
def test_a_kind_that_converts_gives_transformers_logits(tmp_path, plain, kind):
    folder = Path(shutil.copytree(plain, tmp_path / "models--m--x"))
    CONVERTS[kind](folder)
    report = convert(folder, tmp_path / "out.gguf")
    expected, _ = Reference(snapshot(folder))(IDS)
    engine = fiddler.load(tmp_path / "out.gguf", device="cpu", precision="exact")
    torch.testing.assert_close(engine.logits(IDS), expected, rtol=0, atol=2e-5)
    assert not any("rounded" in line for line in report.warnings)  # each of these weights has an exact value in bf16


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_does_not_convert_is_refused_by_its_cause(tmp_path, plain, kind):
    folder = Path(shutil.copytree(plain, tmp_path / "hf"))
    change, message = REFUSED[kind]
    change(folder)
    with pytest.raises(FiddlerError) as caught:
        convert(folder, tmp_path / "out.gguf")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out.gguf").exists()

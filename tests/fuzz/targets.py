"""What is fuzzed: of each target its seeds, and what must hold for any bytes: success, or an error of ours."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from fiddler.converters.checkpoint import Checkpoint
from fiddler.converters.tokenizer.pieces import read_tokenizer_model
from fiddler.converters.tokenizer.tokenizer_json import TokenizerJson
from fiddler.errors import FiddlerError
from fiddler.files.inspection import describe, to_text
from fiddler.files.model_file import ModelFile
from fiddler.generation.request import Request
from fiddler.loading import DEMO_MODEL
from fiddler.models.architecture import EXPERTS
from fiddler.runtime.kv_cache_file import PromptCache
from fiddler.serving.batch_input import JobFile
from fiddler.serving.http.anthropic_conversations import anthropic_conversation, anthropic_settings
from fiddler.serving.http.conversations import conversation_of
from fiddler.serving.http.responses_input import responses_conversation, responses_settings
from fiddler.serving.json_fields import parse_object
from fiddler.serving.request_fields import settings_of
from fuzz.draw import Draw, changed_json
from fuzz.http_target import REQUESTS, http
from fuzz.text_targets import TEXT_RUNS, TEXT_SEEDS
from oracles.small_families import GOOD, drafted

__all__ = ["TARGETS", "Target", "opened"]

TINY = Path(__file__).parents[1] / "data" / "tiny"
CONFIG_KEYS = (
    *("model_type", "rope_scaling", "rope_parameters", "sliding_window", "num_experts", "num_local_experts", "n_group"),
    *("moe_intermediate_size", "norm_topk_prob", "n_shared_experts", "first_k_dense_replace", "q_lora_rank"),
    *("quantization_config", "head_dim", "attention_bias", "tie_word_embeddings", "torch_dtype", "hidden_act"),
)


def opened(path: Path) -> ModelFile:
    """All that `run` does with a model file before it computes, and all that `inspect` does."""
    model = ModelFile.open(path)
    assert to_text(describe(path)).replace("\n", " ").isprintable()
    model.check_runnable()
    assert isinstance(model.tokenizer.encode("a é"), list)
    for name, tensor in model.config.tensors(tied=model.tied).items():
        stored = model.experts(name) if tensor.role in EXPERTS else [model.bits(name)[0]]
        for array in stored:
            array.max()  # every byte can be read
    return model


class Target:
    """One kind of input. Raises nothing but FiddlerError for any bytes."""

    def __init__(self, name: str, seeds: Callable[[], Sequence[bytes]], run: Callable[[bytes, Path], object]) -> None:
        """seeds: inputs to begin with. run: reads an input, may return a refusal; its folder is its own."""
        self.name, self.seeds, self._run = name, seeds, run

    def run(self, data: bytes, folder: Path) -> str | None:
        """Read an input; returns the refusal, or None. Raises AssertionError where that is not one short line."""
        try:
            refusal = self._run(data, folder)
            return refusal if isinstance(refusal, str) else None
        except FiddlerError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 2000, message
            return message


def _gguf(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    opened(path)


def _gguf_seeds() -> list[bytes]:
    return [drafted(family, byte_level=byte_level).to_bytes() for family in GOOD for byte_level in (False, True)]


def _folder(folder: Path) -> Path:
    target = folder / "hf"
    if not target.exists():
        shutil.copytree(TINY, target)
    return target


def _checkpoint(data: bytes, folder: Path) -> None:
    """config.json, tokenizer_config.json and the header of the weights, one of them changed."""
    draw, target = Draw(data), _folder(folder)
    names = "config.json", "tokenizer_config.json"
    which = draw.below(3)
    if which < 2:
        content = changed_json(draw, json.loads((TINY / names[which]).read_text()), CONFIG_KEYS)
        (target / names[which]).write_text(json.dumps(content))
    else:
        weights = (TINY / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", weights[:8])[0]
        header = json.dumps(changed_json(draw, json.loads(weights[8 : 8 + size]), ("__metadata__",))).encode()
        length = struct.unpack("<Q", draw.take(8).ljust(8, b"\0"))[0] if draw.below(8) == 1 else len(header)
        (target / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + weights[8 + size :])
    try:
        checkpoint = Checkpoint.open(target)
        for name in checkpoint.config.tensors(tied=checkpoint.tied):
            for matrix in checkpoint.matrices(name):
                assert matrix.count > 0
    finally:
        for name in (*names, "model.safetensors"):
            shutil.copyfile(TINY / name, target / name)


def _tokenizer_json_read(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer.json"
    if data[:1] == b"{":
        path.write_bytes(data)
    else:
        small = json.loads(json.dumps(_small_tokenizer()))
        path.write_text(json.dumps(changed_json(Draw(data), small, ("dropout", "fuse_unk", "type", "vocab"))))
    tokenizer = TokenizerJson(path)
    if tokenizer.complete:
        tokenizer.pieces()


@cache
def _small_tokenizer() -> dict[str, object]:
    """A tokenizer.json of byte-level BPE, as the `tokenizers` library writes it."""
    from oracles.byte_level import trained

    return json.loads(trained("qwen2", size=300).to_str())


def _tokenizer_model(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    read_tokenizer_model(path)


def _job_file(data: bytes, folder: Path) -> None:
    path = folder / "jobs.jsonl"
    path.write_bytes(data)
    for _ in JobFile(path, Request("")).jobs(()):
        pass


JOBS = (
    b'{"id": 1, "prompt": "Once", "max_tokens": 3, "temperature": 0.5, "stop": ["a"], "seed": 7}\n'
    b'{"custom_id": "b", "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}}\n',
    b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "logprobs": true}\n\n{}',
    b"\xef\xbb\xbf" + b'{"prompt": "a", "logit_bias": {"5": 1.5}, "response_format": {"type": "json_object"}}',
)


@cache
def _demo() -> ModelFile:
    return ModelFile.open(DEMO_MODEL)


def _prompt_cache(data: bytes, folder: Path) -> None:
    """With its checksums right where the bytes ask for it: else nothing would come past them."""
    path = folder / "prompt.cache"
    if data[:1] == b"\1":
        draw = Draw(data[1:])
        header = bytearray(_cache_header(draw.below(5)))
        for _ in range(draw.below(4)):
            header[draw.below(len(header))] = draw.below(256)
        tokens = draw.take(draw.below(64))
        data = b"".join(part + struct.pack("<I", zlib.crc32(part)) for part in (bytes(header), tokens))
        data += draw.take(1 << 16)
    path.write_bytes(data)
    cache_file = PromptCache(path, _demo(), torch.float16)
    assert len(cache_file.tokens) <= _demo().config.context_length


def _cache_header(positions: int) -> bytes:
    config = _demo().config
    numbers = 1, 2, config.block_count, config.head_count_kv, config.head_dim, positions
    return struct.pack("<8s6I32s", b"fiddlrKV", *numbers, _demo().fingerprint)


BODIES: dict[str, dict[str, object]] = {
    "completion": {"prompt": "a", "n_predict": 3, "temperature": 0.5, "stop": ["b"], "logit_bias": [[5, 1.5]]},
    "chat": {
        "model": "a",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
    },
    "responses": {"input": [{"role": "user", "content": "a"}], "instructions": "b", "max_output_tokens": 3},
    "messages": {
        "max_tokens": 3,
        "system": "a",
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    },
}


def _body(data: bytes, folder: Path) -> None:
    """A request's body, as far as it is read without a model."""
    draw = Draw(data)
    kind = draw.choice(sorted(BODIES))
    content = changed_json(
        draw, json.loads(json.dumps(BODIES[kind])), ("n", "stream", "seed", "top_k", "min_p", "user")
    )
    body = parse_object(json.dumps(content).encode())
    if kind == "messages":
        settings_of(anthropic_settings(body), Request(""))
        anthropic_conversation(body)
    elif kind == "responses":
        settings_of(responses_settings(body), Request(""))
        responses_conversation(body)
    else:
        settings_of(body, Request(""))
        if kind == "chat":
            conversation_of(body)


PROGRAMS = (b"", b"\0" * 40, bytes(range(60)), bytes(range(255, 150, -1)), b"\1" * 50)
TARGETS = {
    target.name: target
    for target in (
        Target("gguf", _gguf_seeds, _gguf),
        Target("checkpoint", lambda: PROGRAMS, _checkpoint),
        Target("tokenizer-json", lambda: (*PROGRAMS, json.dumps(_small_tokenizer()).encode()), _tokenizer_json_read),
        Target("tokenizer-model", lambda: [(TINY / "tokenizer.model").read_bytes()], _tokenizer_model),
        Target("jobs", lambda: JOBS, _job_file),
        Target("prompt-cache", lambda: (*PROGRAMS, _cache_header(3)), _prompt_cache),
        Target("body", lambda: PROGRAMS, _body),
        *(Target(name, lambda: TEXT_SEEDS, run) for name, run in TEXT_RUNS.items()),
        Target("http", lambda: REQUESTS, http),
    )
}

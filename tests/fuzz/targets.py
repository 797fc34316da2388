"""What is fuzzed: of each target its seeds, and what must hold for any bytes: success, or an error of ours."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from fiddler.converters.tokenizer.pieces import read_tokenizer_model
from fiddler.converters.tokenizer.vocabulary import read_vocabulary
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
from fuzz.checkpoints import checkpoint, checkpoint_seeds
from fuzz.draw import Draw, changed_json
from fuzz.http_target import REQUESTS, http
from fuzz.small_tokenizers import SMALL, VOCABULARY
from fuzz.text_targets import TEXT_RUNS, TEXT_SEEDS
from oracles.small_families import GOOD, drafted

__all__ = ["TARGETS", "Target", "opened"]

TINY = Path(__file__).parents[1] / "data" / "tiny"


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


def _tokenizer_json(data: bytes, folder: Path) -> None:
    """A folder's vocabulary: tokenizer.json, tokenizer_config.json and config.json, at least one of them changed."""
    draw = Draw(data)
    small = SMALL[draw.choice(list(SMALL))]() if data[:1] != b"{" else None
    files = {
        "tokenizer.json": small,
        "tokenizer_config.json": _settings() if draw.below(4) else None,
        "config.json": {"model_type": "mixtral", "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
    }
    changed = draw.below(8)  # which files are: bits, none of them means the first
    for bit, (name, content) in enumerate(files.items()):
        path = folder / name
        path.unlink(missing_ok=True)
        if small is None and bit == 0:
            path.write_bytes(data)
        elif content is not None:
            copy = json.loads(json.dumps(content))
            path.write_text(json.dumps(changed_json(draw, copy, TOKENIZER_KEYS) if (changed or 1) >> bit & 1 else copy))
    found = read_vocabulary(folder, VOCABULARY)
    assert len(found.metadata()) > 5


def _tokenizer_seeds() -> list[bytes]:
    whole = [json.dumps(make()).encode() for make in SMALL.values()]
    changed = [bytes([kind, 1, which, *range(9)]) for kind in range(len(SMALL)) for which in (1, 2, 4)]
    return [*whole, *PROGRAMS, *changed]


TOKENIZER_KEYS = ("dropout", "fuse_unk", "type", "vocab", "legacy", "add_bos_token", "chat_template", "pad_token")


@cache
def _settings() -> dict[str, object]:
    return json.loads((TINY / "tokenizer_config.json").read_text())


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
        Target("checkpoint", checkpoint_seeds, checkpoint),
        Target("tokenizer-json", _tokenizer_seeds, _tokenizer_json),
        Target("tokenizer-model", lambda: [(TINY / "tokenizer.model").read_bytes()], _tokenizer_model),
        Target("jobs", lambda: JOBS, _job_file),
        Target("prompt-cache", lambda: (*PROGRAMS, _cache_header(3)), _prompt_cache),
        Target("body", lambda: PROGRAMS, _body),
        *(Target(name, lambda: TEXT_SEEDS, run) for name, run in TEXT_RUNS.items()),
        Target("http", lambda: REQUESTS, http),
    )
}

"""llama.cpp's routes about text alone: `/tokenize`, `/detokenize`, `/apply-template`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import check_text
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.conversations import conversation_of
from fiddler.serving.http.service import Service
from fiddler.serving.http.sse import JsonAnswer
from fiddler.serving.request_fields import flag

__all__ = ["apply_template", "detokenize", "tokenize"]

_MOST_TOKENS = 1 << 20


async def tokenize(request: Request) -> Response:
    """POST /tokenize: the ids of `content`, with BOS for `add_special`, with their texts for `with_pieces`."""
    service, body = service_of(request), await read_object(request)
    text = body.get("content", "")
    if not isinstance(text, str):
        raise RequestError(f"content is {quoted(text)}; give a text")
    special = flag(body, "parse_special", service.options.defaults.special)
    ids = await service.on_text(_encode, service, text, flag(body, "add_special"), special)
    if not flag(body, "with_pieces"):
        return JsonAnswer({"tokens": ids})
    return JsonAnswer({"tokens": [{"id": token, "piece": _piece(service.pieces[token])} for token in ids]})


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of `tokens`."""
    service, body = service_of(request), await read_object(request)
    tokens = body.get("tokens", [])
    if not isinstance(tokens, list) or len(tokens) > _MOST_TOKENS or any(type(token) is not int for token in tokens):
        raise RequestError(f"tokens are {quoted(tokens)}; give a list of ids")
    return JsonAnswer({"content": await service.on_text(service.engine.tokenizer.decode, tokens)})


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the text that the chat template makes of `messages`."""
    service, body = service_of(request), await read_object(request)
    return JsonAnswer({"prompt": await service.on_text(service.prompts.text, conversation_of(body))})


def _encode(service: Service, text: str, add_bos: bool, special: bool) -> list[int]:
    engine = service.engine
    check_text("the text", text, engine.tokenizer, engine.config, _MOST_TOKENS)
    return engine.tokenizer.encode(text, add_bos=add_bos and engine.tokenizer.add_bos, parse_special=special)


def _piece(piece: bytes) -> Any:
    """A text, or the bytes of what is no text by itself."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)

"""Routes about the server itself: health, models, properties, slots, and what it does not do."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from fiddler.serving.http.body import service_of
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.ids import fingerprint
from fiddler.serving.http.llama_results import sampling_settings
from fiddler.serving.http.service import Service
from fiddler.serving.http.sse import JsonAnswer

__all__ = ["health", "models", "not_supported", "properties", "slots"]


async def health(request: Request) -> Response:
    """GET /health: 200 as long as requests are computed."""
    service = service_of(request)
    if service.stopping or not service.worker.alive:
        raise HttpError(503, "the server is stopping", retry=10)
    return JsonAnswer({"status": "ok"})


async def models(request: Request) -> Response:
    """GET /v1/models: the one model, for OpenAI's clients (`data`) and Codex and Ollama's (`models`)."""
    service = service_of(request)
    config, name = service.engine.config, service.names[0]
    meta = {
        "n_vocab": config.vocab_size,
        "n_ctx": service.engine.context,
        "n_ctx_train": config.context_length,
        "n_embd": config.embedding_length,
        "size": sum(nbytes for _, nbytes in service.engine.model_file.file.mappings),
    }
    entry = {"id": name, "object": "model", "created": int(service.started), "owned_by": "fiddler", "meta": meta}
    entry |= {"aliases": list(service.names), "tags": []}
    other = {"name": name, "model": name, "slug": name, "display_name": name, "type": "model", "format": "gguf"}
    return JsonAnswer({"object": "list", "data": [entry], "models": [{**other, "capabilities": ["completion"]}]})


async def properties(request: Request) -> Response:
    """GET /props."""
    service = service_of(request)
    tokenizer, defaults = service.engine.tokenizer, service.options.defaults
    params = sampling_settings(defaults.sampling, defaults.max_tokens)
    return JsonAnswer(
        {
            "default_generation_settings": {"n_ctx": service.engine.context, "params": params},
            "total_slots": _slot_count(service),
            "model_alias": service.names[0],
            "model_path": service.path.name,
            "modalities": {"vision": False, "video": False, "audio": False},
            "chat_template": service.prompts.source or "",
            "bos_token": tokenizer.token(tokenizer.bos_id),
            "eos_token": tokenizer.token(tokenizer.eos_id),
            "build_info": fingerprint(service),
            "is_sleeping": False,
        }
    )


async def slots(request: Request) -> Response:
    """GET /slots: what runs now, without its text. There are as many as --parallel says, else as are in use."""
    service = service_of(request)
    if not service.options.slots:
        raise HttpError(501, "this server does not show its slots; start it without --no-slots")
    joined = [text for text in service.worker.running if text.cached is not None]
    rows: list[dict[str, Any]] = []
    for number in range(max(_slot_count(service), len(joined))):
        text = joined[number] if number < len(joined) else None
        rows.append(
            {
                "id": number,
                "n_ctx": service.engine.context,
                "speculative": False,
                "is_processing": text is not None,
                "n_prompt_tokens": 0 if text is None else text.prompt,
                "n_prompt_tokens_processed": 0 if text is None else text.read,
                "n_prompt_tokens_cache": 0 if text is None else text.cached,
                "next_token": [{"n_remain": -1, "n_decoded": 0 if text is None else text.generated}],
            }
        )
    return JsonAnswer(rows)


async def not_supported(request: Request) -> Response:
    """Any route of other servers that this one does not have."""
    path = quote(request.scope["path"])  # a route takes a line break behind it, too
    raise HttpError(501, f"{path} is not supported: fiddler only generates text")


def _slot_count(service: Service) -> int:
    return service.options.parallel or 1

"""Routes for the experts view: which experts a model has, where each lies, and how often each was chosen.

Costs nothing while nobody watches, beyond the counts that `/metrics` has as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.serving.http.body import service_of
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.service import Service
from fiddler.serving.http.sse import EventStream, JsonAnswer, sse

__all__ = ["expert_events", "experts"]

_INTERVAL = 0.5  # [s]
_MOST_WATCHERS = 16


async def experts(request: Request) -> Response:
    """GET /experts: layers, experts, used, device, `resident` [L][ids on the GPU], `counts` [L][E] since the start.

    `layers` are those with experts; `first` is the number of the first of them in the model.
    """
    service = service_of(request)
    config = service.engine.config
    sparse = list(config.sparse_layers)
    shape = {
        "layers": len(sparse),
        "first": sparse[0] if sparse else 0,
        "experts": config.expert_count if sparse else 0,
        "used": config.expert_used_count if sparse else 0,
        "device": service.engine.device,
    }
    return JsonAnswer(shape | await service.on_text(_state, service))


async def expert_events(request: Request) -> Response:
    """GET /experts/events: `resident` and `counts` as in /experts, whenever they change; and totals of tokens."""
    service = service_of(request)
    if service.watchers >= _MOST_WATCHERS:
        raise HttpError(503, f"{_MOST_WATCHERS} connections watch the experts already", retry=10)
    service.watchers += 1

    def close() -> None:
        service.watchers -= 1

    return EventStream(_events(service), close, ping=service.options.ping, timeout=service.options.timeout)


async def _events(service: Service) -> AsyncIterator[bytes]:
    last: dict[str, Any] = {}
    while not service.stopping:
        state = await service.on_text(_state, service)
        if state != last:
            last = state
            yield sse({**state, "at": time.time()})
        await asyncio.sleep(_INTERVAL)


def _state(service: Service) -> dict[str, Any]:
    counters = service.worker.counters
    return {
        "resident": service.engine.runner.resident_experts(),
        "counts": service.totals.counts,
        "prompt_tokens": counters.prompt_tokens,
        "generated_tokens": counters.generated_tokens,
    }

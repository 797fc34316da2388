"""Reads a request's JSON object, within limits of size and time. Knows no fields."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from fiddler.errors import RequestError
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.service import Service
from fiddler.serving.json_fields import parse_object

__all__ = ["read_object", "service_of"]

_PATIENCE = 60.0  # for a whole body [s]
_LARGE = 1 << 18  # [bytes]; parsing more takes milliseconds


def service_of(request: Request) -> Service:
    """The service behind a request."""
    service: Service = request.app.state.service
    return service


async def read_object(request: Request, *, generates: bool = False) -> dict[str, Any]:
    """The body's JSON object. Raises HttpError for one that is too large or too slow, RequestError for no object.

    generates: texts will be opened for it, see `Service.arrived`.
    """
    service = service_of(request)
    limit, parts, size = service.options.body_limit, list[bytes](), 0
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise HttpError(413, f"the body has {length} bytes; at most {limit} are read")
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise HttpError(413, f"the body has more than {limit} bytes")
                parts.append(part)
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {_PATIENCE:g} s") from None
    except ClientDisconnect:
        raise HttpError(400, "the client left before the body had arrived") from None
    if generates:
        service.arrived()
    body = b"".join(parts)
    try:
        return await service.on_text(parse_object, body) if size > _LARGE else parse_object(body)
    except RequestError as error:
        raise RequestError(f"the body {error}".replace("; give one object a line", "; give one object")) from None

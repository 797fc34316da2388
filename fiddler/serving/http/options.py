"""What a server may be told: addresses, keys, limits, and what requests omit. Checked when made."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request

__all__ = ["ServerOptions", "is_loopback"]


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    alias: names of the model, the first is shown. defaults: of requests. token_limit: the largest `max_tokens`.
    cors_origins: web origins whose pages may call the server; "*" for all. parallel: texts at once, see `Engine.batch`.
    queue: texts that run or wait; more are refused. timeout: of one request [s]. body_limit: [bytes].
    template_kwargs: variables of the template, which a request's own replace.
    ping: seconds without an event after which a stream sends a comment. grace: seconds that open requests have to end
    once the server is to stop. Raises RequestError for values that make no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    alias: tuple[str, ...] = ()
    defaults: Request = field(default_factory=lambda: Request(""))
    token_limit: int | None = None
    parallel: int | None = None
    queue: int = 256
    timeout: float = 3600.0
    body_limit: int = 16 << 20
    ping: float = 10.0
    grace: float = 1.0
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    page: bool = True
    metrics: bool = True
    slots: bool = True
    version: str = ""

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError("an API key must be printable ASCII characters without blanks, at least one")
        for origin in self.cors_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise RequestError(f"the origin {quoted(origin)} is none; give one as https://example.org, or *")
        if not self.host or any(not part.isprintable() or part.isspace() for part in self.host):
            raise RequestError(f"the host is {quoted(self.host)}; give a name or an address, as 127.0.0.1")

    @property
    def beyond_loopback(self) -> bool:
        """Whether other machines may reach the server."""
        return not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address, without port and brackets, is this machine and nothing else."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The route of the web page, and the policy that lets a browser run its own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["PAGE", "page", "policy"]

PAGE = Path(__file__).parents[1] / "static" / "index.html"

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
_FIXED = (
    "default-src 'none'",
    "img-src data:",  # its icon
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # a text never becomes elements
    "trusted-types 'none'",
)


async def page(request: Request) -> Response:
    """GET /: the web page, one file that loads nothing else."""
    content = PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": policy(content),
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "X-DNS-Prefetch-Control": "off",  # browsers look up the hosts of links before anybody follows them
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def policy(content: bytes) -> str:
    """The Content-Security-Policy of a page: its inline scripts and styles, by their hashes, may run; nothing loads."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(content):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        hashes[kind.decode()].append(f"'sha256-{digest}'")
    allowed = [" ".join([f"{kind}-src", *found]) for kind, found in hashes.items() if found]
    return "; ".join([*allowed, *_FIXED])

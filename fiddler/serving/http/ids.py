"""Names of responses."""

from __future__ import annotations

import secrets

from fiddler.serving.http.service import Service

__all__ = ["fingerprint", "random_id"]


def random_id(prefix: str) -> str:
    """A new name, as chatcmpl-..."""
    return prefix + secrets.token_hex(12)


def fingerprint(service: Service) -> str:
    """What computes: `b` and fiddler's version, the form that llama.cpp's clients expect."""
    return f"b{service.options.version}"

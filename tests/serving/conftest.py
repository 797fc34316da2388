"""Servers that several files of tests share: each takes seconds to start."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tools.server_process import KEY, ServerProcess

TEMPLATE = Path(__file__).parents[1] / "data" / "templates" / "hermes.jinja"


@pytest.fixture(scope="session")
def server():
    """The demo model behind a template that knows tools and reasoning, without a key."""
    with ServerProcess("--chat-template-file", str(TEMPLATE), "--alias", "demo", "-np", "8") as process:
        yield process


@pytest.fixture(scope="session")
def keyed_server():
    """The demo model without a template, with a key and small limits."""
    limits = ("--queue", "3", "--body-limit", "1", "--timeout", "60", "-np", "2")
    with ServerProcess("--api-key", KEY, *limits) as process:
        yield process


@pytest.fixture
def http(server):
    """A client of `server` for raw requests."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client

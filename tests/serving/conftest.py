"""Servers that several files of tests share: each takes seconds to start."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import sync_playwright

from tools.page_browser import PageDriver, chromium, launch
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


@pytest.fixture(scope="session")
def base_server():
    """The demo model as it is, without a chat template, and without a key."""
    with ServerProcess("-np", "4") as process:
        yield process


@pytest.fixture
def base_http(base_server):
    """A client of `base_server` for raw requests."""
    with httpx.Client(base_url=base_server.url, timeout=300) as client:
        yield client


@pytest.fixture
def http(server):
    """A client of `server` for raw requests."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    """Chromium, for one file of tests: while it runs, no other event loop can on this thread."""
    if chromium() is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright, launch(playwright) as browser:
        yield browser


@pytest.fixture
def driver(browser, server):
    """The page of `server`, in a fresh profile; nothing may go wrong on it, and no request leave the server."""
    with PageDriver.on(browser, server.url) as driver:
        yield driver
        assert driver.problems == []

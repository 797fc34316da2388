"""The server's web page in Chromium: opens it, drives it, and notes what must not happen. For tests and screenshots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, Playwright

__all__ = ["PageDriver", "chromium", "launch", "saying"]

TIMEOUT = 60_000  # [ms]
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The path of an installed Chromium; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser:
    """A browser without a window. Root may not have Chromium's sandbox, and only our own page is shown."""
    return playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


def saying(text: str) -> dict[str, str]:
    """Fields of a request that make any model say exactly this text."""
    return {"grammar": "root ::= " + json.dumps(text)}


@dataclass
class PageDriver:
    """A page and what it did. `problems`: lines on its console, its exceptions, and requests that left the server."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)  # of requests that generate

    @classmethod
    @contextmanager
    def on(cls, browser: Browser, url: str, *, path: str = "/", **options: object) -> Iterator[PageDriver]:
        """Opens the page in a browser profile of its own. options: of `Browser.new_context`."""
        with browser.new_context(**options) as context:  # type: ignore[arg-type]
            context.set_default_timeout(TIMEOUT)
            driver = cls(context.new_page(), url)
            driver._listen()
            driver.page.goto(url + path)
            driver.page.wait_for_function("() => document.querySelector('#model').textContent.length > 1")
            yield driver

    def _listen(self) -> None:
        host = urlsplit(self.url).netloc
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))

        def request(request) -> None:
            parts = urlsplit(request.url)
            if parts.scheme not in ("data", "blob") and parts.netloc != host:
                self.problems.append(f"request to {request.url}")
            if request.method == "POST":
                self.bodies.append(request.post_data_json)

        self.page.on("request", request)

    def fields(self, **fields: object) -> None:
        """Fields of all requests from now on, as a user gives them in the settings."""
        if self.page.locator("#settings").is_hidden():
            self.page.click("#settings-button")
        self.page.fill("#extra", json.dumps(fields) if fields else "")
        self.page.click("#settings-close")

    def new(self) -> None:
        """Begins another conversation."""
        if not self.page.locator("#new").is_visible():
            self.page.click("#menu-button")
        self.page.click("#new")

    def send(self, text: str, *, wait: bool = True) -> None:
        """Types a message and sends it. wait: until the answer has ended."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is generated, in the conversation that is shown."""
        self.page.wait_for_selector("#send:not([aria-label=Stop])")

    @property
    def answers(self) -> Locator:
        """The texts of all answers."""
        return self.page.locator(".message.assistant .said")

    @property
    def messages(self) -> Locator:
        """The texts of all messages of the user."""
        return self.page.locator(".message.user .said")

    def notes(self) -> list[str]:
        """Lines below answers that did not end by themselves."""
        return self.page.locator(".note").all_inner_texts()

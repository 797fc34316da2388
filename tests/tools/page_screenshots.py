"""Pictures of the web page for the documentation: light, dark, on a phone, and the experts.

    python tests/tools/page_screenshots.py            # writes docs/images/page-{light,dark,phone,experts}.png

Starts a server on the demo model for each kind of conversation, and needs Chromium. What a model of 18 million
parameters cannot say, a grammar makes it say: the text of the chats is ours, the stories are the model's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.page_browser import PageDriver, launch, saying
from tools.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "tests" / "data" / "templates" / "hermes.jinja"
COLOURS = 160  # of a picture

QUESTION = "Why is a mixture-of-experts model quick, although it is large?"
ANSWER = """<think>
Two numbers matter: how many weights there are, and how many a token reads.
</think>

Because a token reads only a **small part** of the weights. In every layer a *router* scores the experts, and the best \
two of eight compute:

```python
def layer(x, router, experts, k=2):
    weights, ids = router(x).topk(k)  # [T, K]
    return sum(w * experts[i](x) for w, i in zip(weights, ids))
```

| | weights | read by a token |
|---|--:|--:|
| dense model | 47 B | 47 B |
| Mixtral-8x7B | 47 B | 13 B |

1. The router costs next to nothing.
2. The other six experts rest, wherever they lie.
"""


def chat(driver: PageDriver) -> None:
    """A conversation with reasoning, code and a table, beside two others."""
    driver.fields(max_tokens=60)
    for text in ("Tell me about a fox who could not sleep", "A haiku about rain"):
        driver.send(text)
        driver.new()
    driver.fields(**saying(ANSWER))
    driver.send(QUESTION)
    driver.fields()
    driver.page.locator("#scroll").evaluate("element => { element.scrollTop = 0; }")
    driver.page.wait_for_timeout(300)


def story(driver: PageDriver) -> None:
    """A text that the model continues."""
    driver.page.wait_for_selector("#mode-text[aria-pressed=true]")
    driver.fields(max_tokens=150, ignore_eos=True, seed=11)
    driver.send("One evening, a little owl found a lantern in the old oak tree.")
    driver.fields()
    driver.page.wait_for_timeout(300)


def experts(driver: PageDriver) -> None:
    """The heat map in the middle of a story."""
    story(driver)
    driver.fields(max_tokens=700, ignore_eos=True, seed=12)
    driver.send("The next day, the owl flew to the", wait=False)
    driver.page.click("#show-experts")
    driver.page.click("#span-now")
    driver.page.wait_for_timeout(2500)
    driver.page.hover("#map", position={"x": 420, "y": 150})
    driver.page.wait_for_timeout(600)


def compress(path: Path) -> None:
    """Writes a picture again with few colours: a page has large plain areas, and files stay small."""
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def picture(browser: Browser, url: str, path: Path, steps, **options: object) -> None:
    with PageDriver.on(browser, url, device_scale_factor=1.5, **options) as driver:
        steps(driver)
        driver.page.screenshot(path=path)
        if driver.problems:
            raise SystemExit(f"{path.name}: {driver.problems}")
    compress(path)
    print(f"{path}: {path.stat().st_size >> 10} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    desk, phone = {"width": 1200, "height": 800}, {"width": 390, "height": 780}
    with sync_playwright() as playwright, launch(playwright) as browser:
        with ServerProcess("--chat-template-file", str(TEMPLATE), "--alias", "stories-18m") as server:
            picture(browser, server.url, folder / "page-light.png", chat, viewport=desk, color_scheme="light")
            picture(browser, server.url, folder / "page-phone.png", chat, viewport=phone, color_scheme="light")
        with ServerProcess() as server:
            picture(browser, server.url, folder / "page-dark.png", story, viewport=desk, color_scheme="dark")
            picture(browser, server.url, folder / "page-experts.png", experts, viewport=desk, color_scheme="dark")


if __name__ == "__main__":
    main()

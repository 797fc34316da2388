"""The web page for everybody: keyboard alone, narrow screens, names and contrast by axe; the experts."""

from __future__ import annotations

import json

import pytest
from axe_playwright_python.sync_playwright import Axe

from tools.page_browser import PageDriver, saying

RICH = (
    "<think>\nA short plan.\n</think>\n\n## Steps\n\n1. **One** `code`\n2. [link](https://example.org)\n\n"
    "```python\nprint(1)\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quote\n"
)
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def fine(driver):
    """axe finds nothing: no rule of it is left out."""
    results = Axe().run(driver.page)
    found = [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in results.response["violations"]]
    assert found == []
    assert len(results.response["passes"]) > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_wanting(browser, server, scheme, width):
    """Names, roles and contrast, in every state of the page."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "reduced_motion": "reduce"}
    with PageDriver.on(browser, server.url, **options) as driver:
        fine(driver)
        driver.fields(**saying(RICH))
        driver.send("What are the steps?")
        driver.page.click("details.thought summary")
        driver.page.click("[aria-label='Try again']")
        driver.page.keyboard.press("Escape")
        driver.wait()
        fine(driver)
        driver.page.click("[aria-label='Edit message']")
        driver.page.click("#settings-button")
        fine(driver)
        driver.page.click("#key-change")
        fine(driver)
        driver.page.click("#key-cancel")
        driver.page.click("#settings-close")
        driver.page.click("text=Cancel")
        if width < 500:
            driver.page.click("#menu-button")
        driver.page.click("[aria-label^='Actions for']")
        fine(driver)
        driver.page.keyboard.press("Escape")
        if width < 500:
            driver.page.click("#backdrop", position={"x": width - 10, "y": 300})
        driver.page.click("#mode-text")
        fine(driver)
        driver.page.click("#show-experts")
        driver.page.wait_for_selector("#map[aria-label^='Heat map']")
        fine(driver)
        assert driver.problems == []


def test_everything_can_be_done_with_the_keyboard(driver):
    keyboard = driver.page.keyboard

    def focused():
        return driver.page.evaluate(
            """() => {
                const element = document.activeElement, style = getComputedStyle(element);
                const around = getComputedStyle(element.parentElement).boxShadow;
                const ring = style.outlineStyle !== 'none' || around !== 'none' || element.tagName === 'BODY';
                return [element.getAttribute('aria-label') ?? element.textContent.trim(), ring];
            }"""
        )

    def tab_to(name, keys="Tab"):
        for _ in range(60):
            keyboard.press(keys)
            label, ring = focused()
            assert ring, f"{label} has focus, and nothing shows it"
            if label == name:
                return
        raise AssertionError(f"no way to {name}")

    driver.fields(ignore_eos=True, max_tokens=900)
    tab_to("Message")
    keyboard.type("Tell me")
    keyboard.press("Shift+Enter")
    keyboard.type("a story")
    keyboard.press("Enter")
    driver.page.wait_for_function(
        "() => (document.querySelector('.message.assistant .said')?.textContent.length ?? 0) > 20"
    )
    keyboard.press("Escape")
    driver.wait()
    assert driver.messages.all_inner_texts() == ["Tell me\na story"]
    keyboard.press("ArrowUp")  # edits
    keyboard.press("Control+A")
    keyboard.type("Another one")
    keyboard.press("Enter")
    driver.page.wait_for_selector("[aria-label=Stop]")
    keyboard.press("Escape")
    driver.wait()
    assert driver.messages.all_inner_texts() == ["Another one"]
    assert focused()[0] == "Message"
    tab_to("Previous version", "Shift+Tab")
    tab_to("New conversation", "Shift+Tab")
    tab_to("Actions for Another one")
    keyboard.press("Enter")
    assert focused()[0] == "Rename"
    keyboard.press("ArrowUp")
    assert focused()[0] == "Delete"
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    keyboard.type("Mine")
    keyboard.press("Enter")
    assert focused()[0] == "Mine"
    tab_to("Experts")
    keyboard.press("Enter")
    driver.page.wait_for_selector("#map[aria-label^='Heat map']")
    tab_to(driver.page.get_attribute("#map", "aria-label"))
    keyboard.press("ArrowDown")
    keyboard.press("ArrowRight")
    keyboard.press("ArrowRight")
    assert driver.page.inner_text("#readout").startswith("Layer 1, expert 2: ")
    keyboard.press("/")
    assert focused()[0] == "Message"
    tab_to("Settings", "Shift+Tab")
    keyboard.press("Enter")
    assert focused()[0] == "Close settings"
    keyboard.press("Escape")
    assert focused()[0] == "Settings"


def test_a_phone_shows_all_within_its_width(browser, server):
    with PageDriver.on(browser, server.url, **PHONE) as driver:

        def fits():
            widths = driver.page.evaluate(
                "[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
            )
            assert max(widths) <= 360

        fits()
        driver.fields(**saying(RICH + "\n" + "long" * 60 + "\n\n```\n" + "wide " * 60 + "\n```\n"))
        driver.page.tap("#input")
        driver.page.fill("#input", "word" * 40)
        driver.page.tap("#send")
        driver.wait()
        fits()
        assert not driver.page.locator("#new").is_visible()
        driver.page.tap("#menu-button")
        driver.page.tap("#new")
        driver.page.wait_for_selector("#new", state="hidden")
        assert driver.page.locator("#welcome").is_visible()
        driver.page.tap("#show-experts")
        driver.page.wait_for_selector("#map[aria-label^='Heat map']")
        fits()
        driver.page.tap("#settings-button")
        fits()
        assert driver.problems == []


def test_the_experts_view_follows_the_server(driver, http):
    """The map's numbers are those of /experts, and grow while a text is generated."""
    driver.page.click("#show-experts")
    driver.page.wait_for_selector("#map[aria-label^='Heat map of 8 layers with 8 experts each']")
    assert driver.page.inner_text("#tile-place") == "CPU"

    def tokens(layer, expert):
        driver.page.evaluate("document.querySelector('#map').focus()")
        for key, count in (("ArrowUp", 8), ("ArrowLeft", 8), ("ArrowDown", layer), ("ArrowRight", expert)):
            for _ in range(count):
                driver.page.keyboard.press(key)
        text = driver.page.inner_text("#readout")
        assert text.startswith(f"Layer {layer}, expert {expert}: ")
        return int(text.split(" choices, ")[1].split()[0].replace(",", ""))

    before = tokens(3, 5)
    http.post("/completion", json={"prompt": "Once upon a time", "n_predict": 64, "ignore_eos": True})
    now = http.get("/experts").json()
    total = f"{now['generated_tokens']:,} tokens since the start"
    driver.page.wait_for_function(
        "text => document.querySelector('#tile-speed-detail').textContent === text", arg=total
    )
    assert tokens(3, 5) == now["counts"][3][5] >= before
    assert tokens(7, 7) == now["counts"][7][7]
    row = now["counts"][7]
    shown = float(driver.page.inner_text("#readout").split(": ")[1].split(" %")[0])
    assert abs(shown - 100 * row[7] / sum(row)) <= 0.05 + 1e-9  # one digit is shown
    driver.page.click("#show-chat")
    assert driver.page.locator("#experts-view").is_hidden()


def test_the_experts_view_shows_residents_and_their_hit_rate(driver):
    """A made-up answer: no GPU is here. 2 layers of 4 experts; half of them lie on the GPU and get 3 of 4 choices."""
    state = {"resident": [[0, 1], [2, 3]], "counts": [[30, 30, 10, 10], [5, 5, 20, 10]], "prompt_tokens": 5}
    state |= {"generated_tokens": 7}
    shape = {"layers": 2, "first": 1, "experts": 4, "used": 2, "device": "cuda", **state}
    later = {**state, "counts": [[31, 31, 12, 10], [5, 5, 22, 10]], "at": 4e9}
    driver.page.route("**/experts", lambda route: route.fulfill(json=shape))
    driver.page.route(
        "**/experts/events",
        lambda route: route.fulfill(body=f"data: {json.dumps(later)}\n\n", content_type="text/event-stream"),
    )
    driver.page.click("#show-experts")
    driver.page.wait_for_function("() => document.querySelector('#tile-hits').textContent !== '–'")
    assert driver.page.inner_text("#tile-place") == "4 of 8"
    assert driver.page.inner_text("#tile-place-detail") == "experts on the GPU, 4 on the CPU"
    hits, choices = 31 + 31 + 22 + 10, 84 + 42
    assert driver.page.inner_text("#tile-hits-detail") == f"on the GPU; {100 * hits / choices:.1f} % since the start"
    assert driver.page.inner_text("#tile-hits") == f"{100 * 4 / 6:.1f} %"  # of the last 6 choices
    assert driver.page.inner_text("#readout").startswith("Layer 1, expert 0: ")
    assert driver.page.inner_text("#readout").endswith("on the GPU.")
    assert driver.page.locator("#legend-gpu").is_visible()

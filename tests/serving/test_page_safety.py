"""The web page and strangers: what a model says, keys, servers that end; Markdown as markdown-it reads it."""

from __future__ import annotations

import json
import re
import signal
from html.parser import HTMLParser

import httpx
import pytest
from markdown_it import MarkdownIt

from tools.page_browser import PageDriver, saying
from tools.server_process import KEY, ServerProcess

ATTACKS = (
    "<img src=x onerror=\"window.hacked = 'img'\">",
    "<script>window.hacked = 'script'</script>",
    '<svg onload="window.hacked = 1"></svg><iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>',
    "[link](javascript:window.hacked=1) [data](data:text/html,<script>1</script>) ![pic](https://evil.example/x.png)",
    '`<img src=x onerror="window.hacked = 1">` <a href="javascript:window.hacked=1" style="x">a</a>',
)
ELEMENTS = (
    "#thread :is(img, script, svg:not(.icon), iframe, [onerror], [onload], [style], a[href^=javascript], a[href^=data])"
)

LONG = "() => (document.querySelector('.document')?.textContent.length ?? 0) > 60"


def harmless(driver):
    assert driver.page.evaluate("window.hacked") is None
    assert driver.page.locator(ELEMENTS).count() == 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_html_that_a_model_says_is_text_and_does_nothing(driver, attack):
    """As an answer, as reasoning, in code, as what the user says, as a title, and after a reload."""
    text = f"<think>\n{attack}\n</think>\n\nSee: {attack}\n\n```html\n{attack}\n```\n"
    driver.fields(**saying(text))
    driver.send(attack)
    driver.page.click("details.thought summary")
    for where in (".message.user .said", ".codeblock code"):
        assert driver.page.locator(where).inner_text() == attack
    assert attack.startswith(driver.page.inner_text("#title").rstrip("…"))
    shown = driver.answers.inner_text()
    if not attack.startswith(("[", "`")):
        assert attack in shown
    harmless(driver)
    for link in driver.answers.locator("a").all():
        assert re.match("https?:", link.get_attribute("href"))
        assert "noopener" in link.get_attribute("rel")
    driver.page.reload()
    driver.page.wait_for_selector(".codeblock")
    harmless(driver)
    driver.page.click("#mode-text")
    assert attack in driver.page.inner_text(".document")
    harmless(driver)


def test_arguments_of_calls_are_text(driver):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': {'a': ATTACKS[0]}})}\n</tool_call>"
    driver.fields(tools=[tool], **saying(call))
    driver.send("Call it")
    assert driver.page.inner_text(".codeblock header span") == "call of f"
    assert json.loads(driver.page.inner_text(".codeblock code")) == {"a": ATTACKS[0]}
    harmless(driver)


def test_the_policy_lets_nothing_in_even_if_the_page_tried(browser, server):
    """Strings do not become elements, other scripts and handlers do not run, and nothing is asked of other hosts."""
    with PageDriver.on(browser, server.url) as driver:
        failures = []
        driver.page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
        tried = driver.page.evaluate(
            """async () => {
                const tried = {}, script = document.createElement('script'), image = new Image();
                const attempt = async (name, act) => {
                    try { await act(); tried[name] = 'done'; } catch (error) { tried[name] = error.name; }
                };
                await attempt('html', () => { document.body.innerHTML = '<p>'; });
                await attempt('text', () => { script.text = 'window.hacked = 1'; document.body.append(script); });
                await attempt('fetch', () => fetch('https://evil.example/'));
                document.body.setAttribute('style', 'color: red');
                image.src = 'https://evil.example/x.png';
                return {...tried, hacked: window.hacked ?? null, style: document.body.style.color};
            }"""
        )
        expected = {"html": "TypeError", "text": "TypeError", "fetch": "TypeError", "hacked": None, "style": ""}
        assert tried == expected
        assert failures == [("https://evil.example/x.png", "csp")]
        told = ("Content Security Policy", "TrustedScript", "TrustedHTML", "request to https://evil.example/x.png")
        assert [problem for problem in driver.problems if not any(words in problem for words in told)] == []
        policy = httpx.get(server.url).headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "connect-src 'self'" in policy


def test_a_key_is_asked_for_kept_and_sent_to_the_server_alone(browser, keyed_server):
    with PageDriver.on(browser, keyed_server.url) as driver:
        asked = []
        driver.page.on("request", lambda request: asked.append((request.url, request.headers.get("authorization"))))
        driver.page.fill("#key", "sk-wrong")
        driver.page.keyboard.press("Enter")
        driver.page.wait_for_selector("#key-error:visible")
        assert driver.page.inner_text("#key-error") == "The server does not take the key that is stored here."
        driver.page.fill("#key", KEY)
        driver.page.keyboard.press("Enter")
        driver.page.wait_for_selector("#key-dialog", state="hidden")
        driver.page.wait_for_selector("#mode-text[aria-pressed=true]")  # what needs the key has been read
        driver.fields(max_tokens=8)
        driver.send("Once upon a time")
        assert len(driver.page.inner_text(".document")) > len("Once upon a time")
        driver.page.click("#show-experts")
        driver.page.wait_for_selector("#experts-about >> text=8 layers of 8 experts")
        driver.page.reload()
        driver.page.wait_for_selector("#experts-about >> text=8 layers of 8 experts")
        assert not driver.page.locator("#key-dialog").is_visible()
        keys = {key for url, key in asked if url.startswith(keyed_server.url)}
        assert keys == {None, "Bearer sk-wrong", f"Bearer {KEY}"}
        assert (
            driver.problems
            == ["error: Failed to load resource: the server responded with a status of 401 (Unauthorized)"] * 2
        )


def test_an_answer_outlives_its_server_and_the_next_one_continues_it(browser):
    """kill -9, and later SIGTERM, in the middle of a stream: what came is kept, and a line says so."""
    with ServerProcess() as first, PageDriver.on(browser, first.url) as driver:
        port = first.port
        driver.fields(ignore_eos=True, max_tokens=900)
        driver.send("Once upon a time", wait=False)
        driver.page.wait_for_function(LONG)
        first.stop(signal.SIGKILL)
        driver.wait()
        assert driver.notes() == ["The connection to the server broke off. What came is kept."]
        kept = driver.page.inner_text(".document")
        assert len(kept) > 60
        driver.fields(max_tokens=8)
        driver.page.press("#input", "Enter")
        driver.wait()
        assert driver.notes() == ["The server does not answer. Is it still running?"]
        assert driver.page.inner_text(".document") == kept
        with ServerProcess("--port", str(port)) as second:
            assert second.port == port
            driver.page.click("[aria-label='Try again']")
            driver.wait()
            assert driver.notes() in ([], ["The limit of tokens is reached."])
            text = driver.page.inner_text(".document")
            assert text.startswith(kept)
            assert len(text) > len(kept)
            driver.fields(ignore_eos=True, max_tokens=900)
            driver.page.click("[aria-label='Try again']")
            driver.page.wait_for_function(LONG)
            assert second.stop() == 0  # SIGTERM: the stream's last event says why
            driver.wait()
            assert driver.notes() == ["The server is stopping. What came is kept."]
        assert all("Failed to load resource" in problem for problem in driver.problems)


MARKDOWN = [
    "# One\n\n## Two *em*\n\ntext",
    "a **b** c *d* `e` ~~f~~ __g__ _h_ ***i***",
    "snake_case_name and 2*3*4 and a * b * c",
    "`` a ` b `` and \\*no\\* and \\`x\\`",
    "- a\n- b\n  - c\n  - d\n- e",
    "1. a\n2. b\n\n   more\n\n3. c",
    "3. a\n4. b",
    "* a\n\n* b",
    "- a\n  ```python\n  x = 1\n  ```\n- b",
    "```python\ndef f():\n    return '<b>'\n```",
    "~~~\n```\n~~~",
    "```\nunclosed\n  text",
    "> a\n> b\n>\n> - c\n\nd",
    "> # h\n> ```\n> code\n> ```",
    "a\n\n---\n\nb\n\n***",
    "| a | b | c |\n|---|:-:|--:|\n| 1 | **2** | 3 |\n| 4 | 5 |",
    "[a *b*](https://example.org/x_(y)?q=1&r=2) <https://example.org/a>",
    "**bold**: text, **a** and **b**",
    "text\n- list right after\n\n> quote",
    "1) a\n2) b",
    "*a **b** c*",
    "**a *b* c**",
    "a `b\nc` d",
    "<b>no html</b> a < b & c",
    "[not a link] (address) [x](no address) \\[y](z)",
    "Line one\nline two",
]


class Structure(HTMLParser):
    """The elements and texts of HTML that Markdown means, without the page's own wrappers and buttons."""

    KEPT = re.compile("h[1-6]|p|[uo]l|li|blockquote|pre|code|em|strong|s|a|hr|table|thead|tbody|tr|th|td")

    def __init__(self, html):
        super().__init__()
        self.parts, self.skipped = [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.skipped += tag in ("header", "svg")
        if self.KEPT.fullmatch(tag) and not self.skipped:
            values = dict(attributes)
            self.parts.append(
                ("open", tag, values.get("href") if tag == "a" else values.get("start") if tag == "ol" else None)
            )

    def handle_endtag(self, tag):
        self.skipped -= tag in ("header", "svg")
        if self.KEPT.fullmatch(tag) and tag != "hr" and not self.skipped:
            self.parts.append(("close", tag, None))

    def handle_data(self, data):
        if not self.skipped:
            if self.parts and self.parts[-1][0] == "text":
                data = self.parts.pop()[1] + data
            self.parts.append(("text", data, None))


def structure(html):
    """Parts of HTML, without paragraphs in lists, and with texts' blanks at the edges of blocks gone."""
    parts = Structure(html).parts
    kept, depth = [], 0
    for kind, value, more in parts:
        depth += {("open", "li"): 1, ("close", "li"): -1}.get((kind, value), 0)
        if value == "p" and depth:
            continue
        text = value.strip("\n") if kind == "text" else value
        if kind != "text" or text.strip():
            kept.append((kind, text, more))
    return kept


def test_markdown_is_read_as_markdown_it_reads_it(driver):
    """A conversation in the browser's storage; an oracle of another author."""
    oracle = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    show(driver, *MARKDOWN)
    shown = driver.answers.evaluate_all("answers => answers.map(answer => answer.innerHTML)")
    assert len(shown) == len(MARKDOWN)
    for text, html in zip(MARKDOWN, shown, strict=True):
        assert structure(html) == structure(oracle.render(text)), text


def show(driver, *texts):
    """A stored conversation whose answers are `texts`."""
    nodes = {"root": {"id": "root", "children": [], "chosen": 0}}
    last = "root"
    for number, text in enumerate(part for answer in texts for part in ("?", answer)):
        name = f"n{number}"
        nodes[last]["children"].append(name)
        nodes[name] = {"id": name, "parent": last, "role": ("user", "assistant")[number % 2], "text": text}
        nodes[name] |= {"children": [], "chosen": 0}
        last = name
    conversation = {"id": "x", "title": "x", "named": True, "mode": "chat", "system": "", "updated": 1, "nodes": nodes}
    driver.page.evaluate(
        "c => { localStorage['fiddler.conversation.x'] = c; localStorage['fiddler.current'] = '\"x\"'; }",
        json.dumps(conversation),
    )
    driver.page.reload()
    driver.page.wait_for_selector(".message.assistant")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60000,
        "*a" * 30000,
        "`" * 10 + "a`" * 30000,
        "> " * 30000,
        "- " * 30000,
        "|" * 60000 + "\n|-|",
        "_a" * 9000,
    ],
)
def test_no_text_takes_long_to_show(driver, text):
    show(driver, text)
    milliseconds = driver.page.evaluate(
        """() => {
            const begin = performance.now();
            document.querySelector('#new').click();
            document.querySelectorAll('#list .open')[0].click();
            return performance.now() - begin;
        }"""
    )
    assert len(driver.answers.inner_text()) > 1000 or text[0] in ">-"
    assert milliseconds < 3000

"""The web page in a browser, on the demo model: send, stream, stop, edit, regenerate, reload; what it keeps."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tools.page_browser import PageDriver, saying

GREEDY = {"temperature": 0, "cache_prompt": False}
ENDLESS = {"ignore_eos": True, "max_tokens": 900}


def reply(http, messages, **fields):
    body = {"messages": messages, **GREEDY, **fields}
    return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def user(text):
    return {"role": "user", "content": text}


def begun(driver, characters=1):
    """Wait until an answer has some characters."""
    driver.page.wait_for_function(
        "n => (document.querySelector('.message:last-child .said, .document')?.textContent.length ?? 0) >= n",
        arg=characters,
    )


def test_an_answer_streams_in_and_is_the_server_s(driver, http):
    driver.fields(**GREEDY, max_tokens=120, ignore_eos=True)
    driver.page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const said = document.querySelector('.message.assistant .said');
                if (said) window.seen.push(said.textContent);
            }).observe(document.querySelector('#thread'), {subtree: true, childList: true, characterData: true});
        }"""
    )
    driver.send("Tell me about a cat")
    shown = driver.answers.inner_text()
    assert " ".join(shown.split()) == " ".join(
        reply(http, [user("Tell me about a cat")], max_tokens=120, ignore_eos=True).split()
    )
    seen = [text for text in dict.fromkeys(driver.page.evaluate("window.seen")) if text]
    assert len(seen) > 5  # it came in pieces
    assert [len(text) for text in seen] == sorted(len(text) for text in seen)
    figures = driver.page.inner_text(".figures")
    assert figures.startswith("120 tokens · ")
    assert "tokens/s · first after " in figures
    assert driver.notes() == ["The limit of tokens is reached."]


def test_escape_stops_the_page_and_the_server(driver, http):
    driver.fields(**ENDLESS)
    driver.send("Tell me a long story", wait=False)
    begun(driver, 40)
    driver.page.keyboard.press("Escape")
    driver.wait()
    assert driver.notes() == ["Stopped."]
    assert len(driver.answers.inner_text()) >= 40
    deadline = time.monotonic() + 20
    while any(slot["is_processing"] for slot in http.get("/slots").json()):
        assert time.monotonic() < deadline, "the server goes on"


def test_a_stopped_answer_goes_on_where_it_was(driver, http):
    driver.fields(**GREEDY, max_tokens=12)
    driver.send("Tell me about a dog")
    first = driver.answers.inner_text()
    driver.page.click("[aria-label='Continue the answer']")
    driver.wait()
    rest = reply(http, [user("Tell me about a dog"), {"role": "assistant", "content": first}], max_tokens=12)
    assert driver.answers.inner_text().split() == (first + rest).split()
    assert len(rest.split()) > 3


def test_an_edited_message_gets_a_new_answer_and_the_old_one_stays(driver, http):
    driver.fields(**GREEDY, max_tokens=16)
    driver.send("Tell me about a cat")
    driver.send("And a dog?")
    assert driver.bodies[-1]["messages"] == [
        user("Tell me about a cat"),
        {"role": "assistant", "content": reply(http, [user("Tell me about a cat")], max_tokens=16)},
        user("And a dog?"),
    ]
    old = driver.answers.all_inner_texts()
    driver.page.locator("[aria-label='Edit message']").first.click()
    driver.page.fill("textarea[aria-label='Edit message']", "Tell me about a bird")
    driver.page.press("textarea[aria-label='Edit message']", "Enter")
    driver.wait()
    assert driver.messages.all_inner_texts() == ["Tell me about a bird"]
    assert driver.answers.inner_text().split() == reply(http, [user("Tell me about a bird")], max_tokens=16).split()
    driver.page.click("[aria-label='Previous version']")
    assert driver.messages.all_inner_texts() == ["Tell me about a cat", "And a dog?"]
    assert driver.answers.all_inner_texts() == old


def test_trying_again_gives_another_answer_and_both_stay(driver):
    driver.fields(temperature=1.5, max_tokens=24)
    driver.send("Tell me about a cat")
    first = driver.answers.inner_text()
    driver.page.click("[aria-label='Try again']")
    driver.wait()
    second = driver.answers.inner_text()
    assert second != first
    assert driver.page.locator("text=2 of 2").count() == 1
    driver.page.click("[aria-label='Previous version']")
    assert driver.answers.inner_text() == first
    driver.page.reload()
    assert driver.answers.inner_text() == first
    driver.page.click("[aria-label='Next version']")
    assert driver.answers.inner_text() == second


def test_a_conversation_is_there_after_a_reload_also_one_in_the_middle_of_an_answer(driver):
    driver.fields(max_tokens=8)
    driver.send("Tell me about a cat")
    answer = driver.answers.inner_text()
    driver.page.reload()
    assert driver.messages.all_inner_texts() == ["Tell me about a cat"]
    assert driver.answers.all_inner_texts() == [answer]
    driver.fields(**ENDLESS)
    stored = driver.page.evaluate("Object.values(localStorage).join('').length")
    driver.send("Go on", wait=False)
    driver.page.wait_for_function("n => Object.values(localStorage).join('').length > n + 500", arg=stored)
    before = driver.answers.last.inner_text()
    driver.page.reload()  # at once: a fast machine soon fills the context
    kept = driver.answers.last.inner_text()
    assert len(kept) > 20
    assert before.startswith(kept[:20])
    driver.send("And now?", wait=False)
    begun(driver)
    driver.page.click("[aria-label=Stop]")


def test_conversations_are_renamed_exported_deleted_and_brought_back(driver):
    driver.fields(max_tokens=8)
    driver.send("Tell me about a cat")
    answer = driver.answers.inner_text()
    driver.page.click("#new")
    driver.send("Tell me about a dog")
    assert driver.page.locator("#list .open").all_inner_texts() == ["Tell me about a dog", "Tell me about a cat"]
    driver.page.click("[aria-label='Actions for Tell me about a cat']")
    driver.page.click("role=menuitem[name=Rename]")
    driver.page.fill("[aria-label='Name of the conversation']", "Cats")
    driver.page.keyboard.press("Enter")
    driver.page.click("#list .open >> text=Cats")
    assert driver.page.inner_text("#title") == "Cats"
    files = {}
    for kind in ("Markdown", "JSON"):
        driver.page.click("[aria-label='Actions for Cats']")
        with driver.page.expect_download() as download:
            driver.page.click(f"role=menuitem[name='Export as {kind}']")
        files[download.value.suggested_filename] = Path(download.value.path()).read_text(encoding="utf-8")
    texts = [node.get("text") for node in json.loads(files["Cats.json"])["nodes"].values()]
    assert texts[:-1] == [None, "Tell me about a cat"]
    assert texts[-1].split() == answer.split()  # what a page shows ends without the text's last line breaks
    assert files["Cats.md"] == f"# Cats\n\n## You\n\nTell me about a cat\n\n## demo\n\n{texts[-1]}\n"
    driver.page.click("[aria-label='Actions for Cats']")
    driver.page.click("role=menuitem[name=Delete]")
    assert driver.page.locator("#list .open").all_inner_texts() == ["Tell me about a dog"]
    driver.page.click("text=Undo")
    driver.page.reload()
    assert driver.page.inner_text("#title") == "Cats"
    assert driver.answers.all_inner_texts() == [answer]


def test_requests_have_what_was_set_and_nothing_else(driver):
    driver.send("Hello", wait=False)
    driver.page.keyboard.press("Escape")
    driver.wait()
    own = {"model", "messages", "stream", "n", "timings_per_token", "return_progress"}
    assert driver.bodies[-1].keys() == own
    driver.page.click("#settings-button")
    driver.page.fill("#system", "Be brief.")
    driver.page.fill("#temperature", "0.25")
    driver.page.locator("input[aria-label='Top-p, slider']").fill("0.5")
    driver.page.fill("#max_tokens", "3")
    driver.page.fill("#seed", "7")
    driver.page.fill("#extra", '{"stop": ["x"]')
    assert driver.page.get_attribute("#extra", "aria-invalid") == "true"
    driver.page.fill("#extra", '{"stop": ["x"]}')
    driver.page.reload()
    assert driver.page.input_value("#temperature") == "0.25"
    driver.page.click("#new")
    driver.send("Hello")
    body = driver.bodies[-1]
    changed = {"temperature": 0.25, "top_p": 0.5, "max_tokens": 3, "seed": 7, "stop": ["x"]}
    assert {name: body[name] for name in body.keys() - own} == changed
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, user("Hello")]
    driver.page.click("#reset")
    driver.page.fill("#extra", "")
    driver.send("Hello again", wait=False)
    driver.page.keyboard.press("Escape")
    driver.wait()
    assert driver.bodies[-1].keys() == own


def test_reasoning_is_folded_and_told_from_the_answer(driver):
    driver.fields(grammar='root ::= "<think>\\n" "Hm. It is so." "\\n</think>\\n\\n" "Yes."')
    driver.send("Is it so?")
    assert driver.answers.all_inner_texts() == ["Yes."]
    thought = driver.page.locator("details.thought")
    assert thought.get_attribute("open") is None
    driver.page.click("details.thought summary")
    assert driver.page.locator("details.thought .prose").inner_text() == "Hm. It is so."
    assert thought.locator("summary").inner_text().startswith("Thought for ")
    driver.fields(max_tokens=2)
    driver.send("Sure?")
    assert [message["content"] for message in driver.bodies[-1]["messages"]] == ["Is it so?", "Yes.", "Sure?"]


def test_code_messages_and_answers_are_copied_as_they_are(browser, server):
    text = "Do *this*:\n\n```python\nif a < b:\n    pass\n```\n"
    with PageDriver.on(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as driver:
        driver.fields(**saying(text))
        driver.send("How?\n  So?")
        copied = {"Copy code": "if a < b:\n    pass", "Copy answer": text, "Copy message": "How?\n  So?"}
        for name, expected in copied.items():
            driver.page.click(f"[aria-label='{name}']")
            driver.page.wait_for_selector("#notice >> text=Copied")
            assert driver.page.evaluate("() => navigator.clipboard.readText()") == expected
        assert driver.problems == []


def test_a_long_prompt_s_reading_is_shown(driver):
    driver.page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const reading = document.querySelector('.reading progress');
                if (reading) window.seen.push(reading.parentElement.textContent);
            }).observe(document.querySelector('#thread'), {subtree: true, childList: true});
        }"""
    )
    driver.fields(max_tokens=2)
    driver.send("a long story " * 200)
    tokens = driver.page.evaluate("window.seen.at(-1)")
    assert tokens.startswith("Reading the prompt: ")
    assert int(tokens.split()[-2].replace(",", "")) > 600


def test_without_a_chat_template_the_page_continues_texts(browser, base_server, base_http):
    def continued(prompt):
        body = {"prompt": prompt, **GREEDY, "max_tokens": 12}
        return base_http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with PageDriver.on(browser, base_server.url) as driver:
        driver.page.wait_for_selector("#mode-text[aria-pressed=true]")
        driver.fields(**GREEDY, max_tokens=12)
        driver.send("Once upon a time")
        text = "Once upon a time" + continued("Once upon a time")
        assert driver.page.inner_text(".document").split() == text.split()
        driver.page.press("#input", "Enter")  # nothing more: it goes on
        driver.wait()
        text += continued(text)
        assert driver.page.inner_text(".document").split() == text.split()
        driver.page.click("[aria-label='Edit text']")
        assert driver.page.input_value("textarea[aria-label='Edit text']") == text
        driver.page.fill("textarea[aria-label='Edit text']", "The cat sat")
        driver.page.click("text=Keep")
        driver.send("on the")
        assert driver.bodies[-1]["prompt"] == "The cat sat on the"
        assert (
            driver.page.inner_text(".document").split()
            == ("The cat sat on the" + continued("The cat sat on the")).split()
        )
        driver.page.click("#mode-chat")  # the same, as messages
        assert driver.messages.all_inner_texts() == ["The cat sat", "on the"]
        driver.send("Hello", wait=True)
        assert driver.bodies[-1]["messages"][0] == user("The cat sat\non the")
        assert driver.problems == []

"""Requests that may wait, beside those of people who do not."""

from __future__ import annotations

import re
import threading
import time


def processing(http):
    """Requests that are computed now."""
    return float(re.search(r"^llamacpp:requests_processing (\S+)$", http.get("/metrics").text, re.MULTILINE)[1])


def test_a_request_of_the_flex_tier_lets_others_pass(http):
    """As many as run at once, and more that wait: another request is answered before any of them ends."""
    ended = []

    def flex():
        body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "service_tier": "flex"}
        answer = http.post("/v1/completions", json=body).json()
        ended.append(answer["usage"]["completion_tokens"])

    threads = [threading.Thread(target=flex) for _ in range(12)]
    for thread in threads:
        thread.start()
    while processing(http) < 8:
        time.sleep(0.01)
    assert http.post("/v1/completions", json={"prompt": "The", "max_tokens": 3}).json()["choices"]
    assert not ended
    for thread in threads:
        thread.join()
    assert ended == [400] * 12
    answer = http.post("/v1/completions", json={"prompt": "The", "service_tier": 1})
    assert (answer.status_code, answer.json()["error"]["message"].split(";")[0]) == (400, "service_tier is 1")

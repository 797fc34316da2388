"""GET /metrics tells the memory of keys and values and of the tree that finds them: a server's growth by prompts."""

from __future__ import annotations

POSITION = 8 * 2 * 4 * 32 * 2  # bytes of the demo: layers, keys and values, heads, their width, float16
BLOCK = 32 * POSITION


def metric(http, name):
    """A number of /metrics."""
    lines = http.get("/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith(f"fiddler_{name} "))))


def taken(http):
    """Bytes of keys and values."""
    return metric(http, "kv_cache_bytes")


def test_a_prompt_takes_the_blocks_of_its_positions_and_the_same_prompt_no_more(http):
    before = taken(http)
    body = {"prompt": "A zebra and " + "seven yaks " * 40, "n_predict": 1, "temperature": 0}
    tokens = http.post("/completion", json=body).json()["timings"]
    first = taken(http)
    new = tokens["prompt_n"] // 32  # at least: what an earlier prompt has in common is not stored again
    assert new > 2
    assert first % BLOCK == 0
    assert before + (new - 8) * BLOCK <= first <= before + (new + 2) * BLOCK
    http.post("/completion", json=body)
    assert taken(http) <= first + BLOCK


def test_past_blocks_are_counted_and_the_tree_takes_less_than_a_hundredth_of_the_keys_and_values(http):
    before = metric(http, "prefix_cache_blocks")
    body = {"prompt": "A yak and " + "nine zebras " * 40, "n_predict": 1, "temperature": 0}
    tokens = http.post("/completion", json=body).json()["timings"]["prompt_n"]
    blocks = metric(http, "prefix_cache_blocks")
    assert tokens // 32 <= blocks - before <= tokens // 32 + 2
    assert 300 * blocks < metric(http, "prefix_cache_tree_bytes") < BLOCK // 100 * blocks

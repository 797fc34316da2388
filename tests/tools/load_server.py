"""Load a server with many clients at once: short and long texts, clients that leave, and requests that make no sense.

    python tests/tools/load_server.py --clients 64 --seconds 60                      # starts one on the demo model
    python tests/tools/load_server.py --url http://127.0.0.1:8080 --seconds 600      # loads one that runs, ours or not

Prints p50 and p99 of the time to the first token and of the whole request, tokens a second, answers by status, and
memory, threads and descriptors of the process over time. Exits with 1 where an answer is not what its request deserves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.server_process import ServerProcess

WORDS = "once upon a time there was a little cat dog bird who liked to play in the big garden with a ball"
MALFORMED = (
    b"{",
    b'{"messages": 1}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "x"}], "grammar": "root ::= ("}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -7}',
)


@dataclass
class Totals:
    """What all clients saw."""

    first: list[float] = field(default_factory=list)  # times to the first token [s]
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def body_of(chance: random.Random, kind: str, stream: bool) -> dict[str, object]:
    count = chance.randint(4, 20) if kind == "short" else chance.randint(60, 250)
    text = " ".join(chance.choices(WORDS.split(), k=count))
    tokens = chance.randint(1, 16) if kind == "short" else chance.randint(64, 400)
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": stream}


async def generate(http: httpx.AsyncClient, totals: Totals, chance: random.Random, kind: str) -> None:
    """One text; "cancelled": left after some tokens, or without a stream after some time."""
    stream = chance.random() < 0.7
    body = body_of(chance, "long" if kind == "cancelled" else kind, stream)
    began = time.perf_counter()
    if not stream:
        limit = chance.uniform(0.02, 1.0) if kind == "cancelled" else None
        try:
            async with asyncio.timeout(limit):
                answer = await http.post("/v1/chat/completions", json=body)
        except TimeoutError:
            totals.kinds["left"] += 1
            return
        totals.kinds[str(answer.status_code)] += 1
        if answer.status_code != 200:
            totals.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
            return
        totals.tokens += answer.json()["usage"]["completion_tokens"]
        totals.whole.append(time.perf_counter() - began)
        return
    leave = chance.randint(1, 30) if kind == "cancelled" else None
    await read_stream(http, totals, body, leave, began)


async def read_stream(
    http: httpx.AsyncClient, totals: Totals, body: dict[str, object], leave: int | None, began: float
) -> None:
    count, done = 0, False
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        totals.kinds[str(answer.status_code)] += 1
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    totals.wrong.append(line[:200])
                    return
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    if not count:
                        totals.first.append(time.perf_counter() - began)
                    count += 1
                    totals.tokens += 1
            if leave is not None and count >= leave:
                totals.kinds["left"] += 1
                return
    totals.whole.append(time.perf_counter() - began)
    if not done:
        totals.wrong.append(f"a stream of {count} tokens without its end")


async def malformed(http: httpx.AsyncClient, totals: Totals, chance: random.Random) -> None:
    answer = await http.post(
        "/v1/chat/completions", content=chance.choice(MALFORMED), headers={"Content-Type": "application/json"}
    )
    totals.kinds[f"malformed {answer.status_code}"] += 1
    if not 400 <= answer.status_code < 500:
        totals.wrong.append(f"malformed: {answer.status_code} {answer.text[:200]}")


async def client(http: httpx.AsyncClient, totals: Totals, end: float, seed: int) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        kind = chance.choices(("short", "long", "cancelled", "malformed"), (5, 2, 2, 1))[0]
        try:
            if kind == "malformed":
                await malformed(http, totals, chance)
            else:
                await generate(http, totals, chance, kind)
        except httpx.HTTPError as error:
            totals.wrong.append(f"{kind}: {type(error).__name__}: {error}")


async def load(url: str, clients: int, seconds: float, process: ServerProcess | None) -> Totals:
    totals, end = Totals(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        tasks = [asyncio.ensure_future(client(http, totals, end, seed)) for seed in range(clients)]
        while process is not None and time.monotonic() < end:
            usage = process.memory()
            print(f"{end - time.monotonic():6.0f} s left: {usage['anonymous'] >> 20} MiB, {usage}", flush=True)
            await asyncio.sleep(max(1.0, seconds / 12))
        await asyncio.gather(*tasks)
    return totals


def percentiles(times: list[float]) -> str:
    if len(times) < 2:
        return "none"
    cuts = statistics.quantiles(times, n=100)
    return f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s of {len(times)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="server to load; if not given, one is started on the demo model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    started = nullcontext(None) if arguments.url else ServerProcess()
    with started as process:
        url = arguments.url or process.url
        began = time.monotonic()
        totals = asyncio.run(load(url, arguments.clients, arguments.seconds, process))
        seconds = time.monotonic() - began
        print(f"first token: {percentiles(totals.first)}")
        print(f"whole request: {percentiles(totals.whole)}")
        print(f"{totals.tokens / seconds:.0f} tokens/s in {seconds:.0f} s; {dict(totals.kinds)}")
        if process is not None:
            print(f"at the end: {process.memory()}; stderr: {process.errors!r}")
            print(f"SIGTERM: exit code {process.stop()}")
    for wrong in totals.wrong[:20]:
        print("WRONG", wrong)
    raise SystemExit(bool(totals.wrong))


if __name__ == "__main__":
    main()

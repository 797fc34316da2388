"""Rounds of work of all kinds, by one engine in this process or by a server, for `soak.py`. Knows no bounds."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from fiddler import Constraint, FiddlerError, Sampling, load
from fiddler.chat import Chat
from fiddler.engine import Engine
from fiddler.runtime.prefix_cache import PrefixCache
from tools.server_process import ServerProcess

__all__ = ["EngineWork", "Held", "ServerWork"]

STORY = "once upon a time there was a little cat dog bird who liked to play in the big garden with a ball"
WORDS = STORY.split()
TEMPLATE = Path(__file__).parents[1] / "data" / "templates" / "hermes.jinja"
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}}
GRAMMAR = 'root ::= ("yes" | "no") " " [a-z]{1,9}'
PROBES = ("Once upon a time", "The cat sat", " ".join(WORDS * 6))
REMEMBERED = 512  # blocks of past sequences: full within the first rounds
CONTEXT = 1024
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class Held(NamedTuple):
    """Memory of the KV caches [bytes]; blocks of past prompts; an estimate of the tree that finds these [bytes]."""

    kv_bytes: int
    blocks: int
    tree_bytes: int


def text(chance: random.Random, least: int, most: int) -> str:
    """Words of a story."""
    return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))


class EngineWork:
    """One engine, asked from one thread. `done`: requests by kind; `refused`: those that had to be and were."""

    def __init__(self, model: str | None, options: dict[str, Any]) -> None:
        """options: of `load`."""
        self.done = Counter[str]()
        self._chance = random.Random(1)
        self.engine = load(*([] if model is None else [model]), context=CONTEXT, **options)
        runner = self.engine.runner
        runner.prefix_cache = PrefixCache(runner.pool, REMEMBERED)
        kinds: tuple[Callable[[Engine, random.Random], None], ...] = (
            *(short, long, beams, batch, constrained, chat, cancelled, refused),
        )
        self._kinds = kinds

    def round(self, seconds: float) -> None:
        """Requests of all kinds for some time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = self._chance.choice(self._kinds)
            kind(self.engine, self._chance)
            self.done[kind.__name__] += 1
        gc.collect()  # chats that failed, whose errors refer to them, have processes

    def texts(self) -> list[str]:
        """Greedy and seeded continuations of the probes."""
        settings = Sampling(temperature=0.0), Sampling(temperature=0.8, seed=7)
        return [self.engine.generate(probe, each, max_tokens=48).text for probe in PROBES for each in settings]

    def held(self) -> Held:
        """KV caches and past prompts."""
        runner = self.engine.runner
        return Held(runner.kv_taken(), runner.past_blocks(), runner.past_bytes())

    def close(self) -> None:
        """Free the model."""
        self.engine.close()


def short(engine: Engine, chance: random.Random) -> None:
    engine.generate(text(chance, 4, 20), max_tokens=chance.randint(1, 16))


def long(engine: Engine, chance: random.Random) -> None:
    engine.generate(text(chance, 200, 500), max_tokens=chance.randint(16, 128))


def beams(engine: Engine, chance: random.Random) -> None:
    engine.beam_search(text(chance, 4, 20), chance.randint(2, 5), max_tokens=12)


def batch(engine: Engine, chance: random.Random) -> None:
    prompts = [text(chance, 4, 60) for _ in range(6)]
    outcomes = dict(engine.batch([*prompts, text(chance, 3000, 3000)], max_tokens=16))
    assert isinstance(outcomes[6], FiddlerError)
    assert not any(isinstance(outcomes[index], FiddlerError) for index in range(6))


def constrained(engine: Engine, chance: random.Random) -> None:
    if chance.random() < 0.5:
        constraint = Constraint.json_schema(SCHEMA)
        answer = engine.generate(text(chance, 4, 20), max_tokens=200, constraint=constraint)
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.text), dict)
    else:
        constraint = Constraint.grammar(GRAMMAR)
        assert engine.generate(text(chance, 4, 20), max_tokens=8, constraint=constraint).text[:1] in "yn"


def chat(engine: Engine, chance: random.Random) -> None:
    talk = Chat(engine, text(chance, 2, 5), max_tokens=12, template=TEMPLATE.read_text(), tools=[TOOL])
    for _ in range(2):
        assert list(talk.send(text(chance, 2, 9))) is not None
    talk.close()


def cancelled(engine: Engine, chance: random.Random) -> None:
    pieces = engine.stream(text(chance, 4, 200), max_tokens=100)
    for _ in range(chance.randint(1, 8)):
        next(pieces, None)
    pieces.close()


def refused(engine: Engine, chance: random.Random) -> None:
    wrong: Callable[[], object] = chance.choice(
        (
            lambda: engine.generate(text(chance, 3000, 3000)),
            lambda: engine.generate([10**6]),
            lambda: Sampling(temperature=-1.0),
            lambda: Constraint.grammar("root ::= ("),
            lambda: Constraint.json_schema({"type": "nothing"}),
            lambda: engine.generate("a", max_tokens=-3),
            lambda: list(Chat(engine, template="{{ 1 / 0 }}").send("a")),
        )
    )
    try:
        wrong()
    except FiddlerError:
        return
    raise AssertionError("a request that makes no sense was answered")


class ServerWork:
    """`fiddler serve` in a process of its own, asked by many clients at once."""

    def __init__(self, model: str | None, options: dict[str, Any], clients: int) -> None:
        """options: of `load`, which the command has as well."""
        self.done = Counter[str]()
        given = {"chat-template-file": TEMPLATE, "ctx": CONTEXT, **options}
        flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.process = ServerProcess(*([] if model is None else [model]), *flags)
        self._clients, self._rounds = clients, 0

    def round(self, seconds: float) -> None:
        """Requests of all kinds for some time, over connections that are closed then."""
        self._rounds += 1
        asyncio.run(self._load(time.monotonic() + seconds))

    async def _load(self, end: float) -> None:
        limits = httpx.Limits(max_connections=self._clients)
        async with httpx.AsyncClient(base_url=self.process.url, timeout=600, limits=limits) as http:
            await asyncio.gather(*(self._client(http, end, number) for number in range(self._clients)))

    async def _client(self, http: httpx.AsyncClient, end: float, number: int) -> None:
        chance = random.Random(self._rounds * 1000 + number)
        while time.monotonic() < end:
            kind = chance.choice(("short", "long", "batch", "constrained", "chat", "cancelled", "refused"))
            path, body = body_of(kind, chance)
            if kind == "cancelled":
                async with http.stream("POST", path, json={**body, "stream": True}) as answer:
                    async for _ in answer.aiter_lines():
                        if chance.random() < 0.2:
                            break
            else:
                answer = await http.post(path, json=body)
                assert (answer.status_code == 200) == (kind != "refused"), (kind, body, answer.text[:300])
                assert answer.status_code < 500, answer.text
            self.done[kind] += 1

    def texts(self) -> list[str]:
        """Greedy and seeded continuations of the probes."""
        bodies = [{"prompt": probe, "n_predict": 48, **each} for probe in PROBES
                  for each in ({"temperature": 0}, {"temperature": 0.8, "seed": 7})]  # fmt: skip
        with httpx.Client(base_url=self.process.url, timeout=600) as http:
            return [http.post("/completion", json=body).json()["content"] for body in bodies]

    def held(self) -> Held:
        """KV caches and past prompts."""
        lines = httpx.get(f"{self.process.url}/metrics", timeout=600).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        names = "kv_cache_bytes", "prefix_cache_blocks", "prefix_cache_tree_bytes"
        return Held(*(int(float(values[f"fiddler_{name}"])) for name in names))

    def close(self) -> None:
        """End the server, which must have said nothing of errors on stderr."""
        assert self.process.stop() == 0, self.process.errors
        assert "error" not in self.process.errors, self.process.errors


def body_of(kind: str, chance: random.Random) -> tuple[str, dict[str, object]]:
    """A request's path and body."""
    if kind == "refused":
        return chance.choice(
            (
                ("/v1/chat/completions", {"messages": 1}),
                ("/v1/completions", {"prompt": text(chance, 3000, 3000)}),
                ("/completion", {"prompt": "a", "grammar": "root ::= ("}),
                ("/v1/responses", {"input": "a", "temperature": "hot"}),
                ("/v1/messages", {"messages": [{}]}),
            )
        )
    if kind == "chat":
        messages = [{"role": "user", "content": text(chance, 2, 30)}]
        path = chance.choice(("/v1/chat/completions", "/v1/messages"))
        return path, {"messages": messages, "max_tokens": 16}
    body: dict[str, object] = {"prompt": text(chance, 4, 30), "max_tokens": chance.randint(1, 16)}
    if kind in ("long", "cancelled"):
        body |= {"prompt": text(chance, 200, 500), "max_tokens": chance.randint(16, 128)}
    elif kind == "batch":
        body |= {"prompt": [text(chance, 4, 60) for _ in range(3)], "n": 2}
    elif kind == "constrained":
        form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        body |= {"max_tokens": 40, **({"response_format": form} if chance.random() < 0.5 else {"grammar": GRAMMAR})}
    return "/v1/completions", body

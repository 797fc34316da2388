"""Clients of a server, all at once, beside a batch of the same requests: generated tokens/s of both, and their ratio.

    python tests/tools/measure_server.py MODEL.gguf --clients 16 --new 48,128
    python tests/tools/measure_server.py MODEL.gguf --device cuda --gpu-experts 16 --turns 7
    python tests/tools/measure_server.py MODEL.gguf --modes whole --spread 10

The server is a process of its own. This one has the clients, and an engine for the batch, loaded as `fiddler batch`
does: a GPU must hold so many experts for each of the two. In each turn the batch runs while the server is idle, then
the clients, for answers in one piece ("whole") and as streams. Texts are greedy, have their full length and reuse no
prompt's cache. Seconds go from the first request to the last answer: prompts, reading requests and writing answers are
part of them.
--spread: milliseconds over which the clients begin, evenly; 0: all at once.
At the end: seconds to the first token of a request that is alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import fiddler
from fiddler.generation.request import Request
from fiddler.sampling.sampler import Sampling

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from tools.server_process import ServerProcess

WORDS = ("once", "upon", "a", "time", "there", "was", "little", "cat", "dog", "who", "liked", "to", "play", "garden")
MODES = ("whole", "stream")


def bodies(args, new, turn, stream):
    """The requests of one turn: other prompts each time, the same for both ways."""
    chance = random.Random(f"{args.seed} {new} {turn}")
    prompts = [" ".join(chance.choices(WORDS, k=args.prompt)) for _ in range(args.clients)]
    fields = {"max_tokens": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False, "stream": stream}
    return [{"prompt": prompt, **fields, "stream_options": {"include_usage": True}} for prompt in prompts]


class Client:
    """A connection that stays open. Sends bytes that were made before: as little work beside the server as possible."""

    async def connect(self, url):
        address = urlsplit(url)
        self._host = address.netloc
        self._reader, self._writer = await asyncio.open_connection(address.hostname, address.port)
        return self

    async def generate(self, body, delay=0.0):
        """Generated tokens, and seconds from sending to the first bytes of the answer's body."""
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        await asyncio.sleep(delay)
        begun = time.perf_counter()
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), (head, await self._reader.read(1000))
        if b"content-length:" in head:
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer, first = await self._reader.readexactly(size), time.perf_counter()
        else:
            answer, first = b"", None
            while size := int(await self._reader.readline(), 16):
                part = (await self._reader.readexactly(size + 2))[:-2]
                first = time.perf_counter() if first is None else first
                answer = part if part.startswith(b'data: {"id"') else answer
            await self._reader.readline()
            answer = answer.removeprefix(b"data: ")
        return json.loads(answer)["usage"]["completion_tokens"], first - begun

    def close(self):
        self._writer.close()


async def served(url, requests, spread):
    """All requests, begun within `spread` seconds: seconds until the last answer, and what each had."""
    clients = [await Client().connect(url) for _ in requests]
    delays = [spread * i / len(requests) for i in range(len(requests))]
    begun = time.perf_counter()
    each = zip(clients, requests, delays, strict=True)
    answers = await asyncio.gather(*(client.generate(body, delay) for client, body, delay in each))
    seconds = time.perf_counter() - begun
    for client in clients:
        client.close()
    return seconds, answers


class Turns:
    """Both ways, measured in turns."""

    def __init__(self, args, engine, server):
        self._args, self._engine, self._server = args, engine, server

    def run(self):
        args = self._args
        for new in args.new:
            rates, steps = ({name: [] for name in ("batch", *args.modes)} for _ in range(2))
            for turn in range(-1, args.turns):  # the first one, which is short, is not counted
                for name in rates:
                    count = new if turn >= 0 else 4
                    seconds, stepped = self._batch(count, turn) if name == "batch" else self._served(count, turn, name)
                    if turn >= 0:
                        rates[name].append(args.clients * new / seconds)
                        steps[name].append(stepped)
            self._say(new, rates, steps)
        waits = sorted(self._alone() for _ in range(9))
        print(f"alone, first token: {1e3 * median(waits):.2f} ms ({1e3 * waits[0]:.2f} to {1e3 * waits[-1]:.2f})")

    def _say(self, new, rates, steps):
        print(f"{self._args.clients} x {new} tokens, {self._args.turns} turns:")
        for name, values in rates.items():
            print(f"  {name:6} {median(values):7.1f} tokens/s ({min(values):.1f} to {max(values):.1f})", end="")
            print(f", steps {median(steps[name]):g} ({min(steps[name])} to {max(steps[name])})", end="")
            ratios = sorted(rate / batch for rate, batch in zip(values, rates["batch"], strict=True))
            beside = f", {median(ratios):.3f} of the batch ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(beside if name != "batch" else "", flush=True)

    def _batch(self, new, turn):
        """Seconds and steps of a batch."""
        prompts = [body["prompt"] for body in bodies(self._args, new, turn, stream=False)]
        greedy, steps = Sampling(temperature=0.0), []
        begun = time.perf_counter()
        requests = [Request(prompt, greedy, new, ignore_eos=True, reuse=False) for prompt in prompts]
        outcomes = dict(self._engine.batch(requests, parallel=len(requests), on_step=lambda *step: steps.append(step)))
        seconds = time.perf_counter() - begun
        assert all(len(outcome.tokens) == new for outcome in outcomes.values()), outcomes
        return seconds, len(steps)

    def _served(self, new, turn, mode):
        """Seconds and steps of the clients."""
        requests, before = bodies(self._args, new, turn, stream=mode == "stream"), self._steps()
        seconds, answers = asyncio.run(served(self._server.url, requests, 1e-3 * self._args.spread))
        assert [tokens for tokens, _ in answers] == [new] * len(requests), answers
        return seconds, self._steps() - before

    def _alone(self):
        """Seconds to the first token of one request."""
        _, ((_, first),) = asyncio.run(served(self._server.url, bodies(self._args, 2, -1, stream=True)[:1], 0.0))
        return first

    def _steps(self):
        """Steps of the server so far."""
        with urllib.request.urlopen(f"{self._server.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("llamacpp:n_decode_total "))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--gpu-memory", help="of each process")
    parser.add_argument("--gpu-experts", type=int)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=24, help="words")
    parser.add_argument("--new", default="48,128", help="tokens that each request generates: numbers")
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--spread", type=float, default=0.0, help="[ms]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.new, args.modes = [int(each) for each in args.new.split(",")], args.modes.split(",")
    gpu = {"gpu_memory": args.gpu_memory, "gpu_experts": args.gpu_experts}
    gpu = {name: value for name, value in gpu.items() if value is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in gpu.items()]
    options += [f"--device={args.device}", f"--ctx={args.ctx}", f"--parallel={args.clients}"]
    with (
        ServerProcess(str(args.model), *options, env={"FIDDLER_DEVICE": args.device}) as server,
        fiddler.load(args.model, args.device, context=args.ctx, notify=print, **gpu) as engine,
    ):
        gc.freeze()  # as commands do: collections would walk through torch's modules
        print(f"{args.model.name}: {engine.where}", flush=True)
        Turns(args, engine, server).run()


if __name__ == "__main__":
    main()

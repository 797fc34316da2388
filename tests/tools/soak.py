"""Keeps one process busy with requests of all kinds, and says whether it grows.

    python tests/tools/soak.py --minutes 60                      # an engine in this process, on the shipped model
    python tests/tools/soak.py --server --minutes 8 --clients 16   # `fiddler serve` as a process
    python tests/tools/soak.py MODEL.gguf --minutes 8 --threads 2
    python tests/tools/soak.py --gpu-experts 16 --precision exact    # on a GPU, with so many of the experts there

Short and long prompts, beams, batches, constrained texts, chats, texts that are cancelled and requests that are
refused, in rounds of 10 s. After each round, while nothing runs: anonymous memory (RssAnon), of it the KV caches on the
CPU, whose blocks are taken once and used again; the tree that finds past prompts' blocks, estimated by their number,
which has a limit of its own (`TREE_BYTES`); the rest; anonymous memory of child processes; threads and descriptors. The
exit code is 1 where greedy or seeded text at the end differs from that at the start, the tree is beyond its limit, or,
of the rounds behind the warm-up, the last third has more rest, or children with more memory, in the median than the
first third by more than --bound, or more threads or descriptors at most.
"""

from __future__ import annotations

import argparse
import atexit
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fiddler.runtime.prefix_cache import TREE_BYTES
from tools.soak_work import EngineWork, Held, ServerWork

ROUND = 10.0  # [s]


@dataclass(frozen=True)
class Usage:
    """Of a process: anonymous memory, of it KV caches and the tree of past blocks, that of child processes [MiB]."""

    anonymous: float
    kv: float
    tree: float
    blocks: int
    children: float
    threads: int
    descriptors: int

    @property
    def rest(self) -> float:
        """Anonymous memory beside the KV caches and the tree [MiB]."""
        return self.anonymous - self.kv - self.tree


def usage(pid: int, held: Held, *, on_gpu: bool) -> Usage:
    """The usage of a process now, whose KV caches are, or are not, in a GPU's memory."""
    status = _status(pid)
    children = sum(int(_status(child).get("RssAnon", "0").split()[0]) for child in descendants(pid))
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir())) - (pid == os.getpid())  # less that of the listing
    return Usage(
        anonymous=int(status["RssAnon"].split()[0]) / 1024,
        kv=0 if on_gpu else held.kv_bytes / 2**20,
        tree=held.tree_bytes / 2**20,
        blocks=held.blocks,
        children=children / 1024,
        threads=int(status["Threads"]),
        descriptors=descriptors,
    )


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def growth(rows: list[Usage], bound: float) -> list[str]:
    """What grew from the first to the last third of the rows, in a line each."""
    third = max(1, len(rows) // 3)
    first, last = rows[:third], rows[-third:]
    lines = [f"tree: {row.tree:.1f} MiB" for row in rows if row.tree > TREE_BYTES / 2**20]
    for name in ("rest", "children"):
        before, after = (statistics.median(getattr(row, name) for row in part) for part in (first, last))
        if after - before > bound:
            lines.append(f"{name}: {before:.1f} -> {after:.1f} MiB")
    for name in ("threads", "descriptors"):
        before, after = (max(getattr(row, name) for row in part) for part in (first, last))
        if after > before:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="the shipped one where none is given")
    parser.add_argument("--server", action="store_true", help="a server as a process, not an engine in this one")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--warm-up", type=float, default=2.0, help="minutes at the start that are not compared")
    parser.add_argument("--bound", type=float, default=8.0, help="MiB by which memory may grow behind the warm-up")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu-experts", type=int, help="compute on a GPU, with so many experts in its memory")
    parser.add_argument("--precision", choices=("fast", "exact"), help="exact on a GPU: there texts may part else")
    arguments = parser.parse_args()
    begun = time.monotonic()
    options = {name: getattr(arguments, name) for name in ("threads", "gpu_experts", "precision")}
    options = {name: value for name, value in options.items() if value is not None}
    options["device"] = "cuda" if "gpu_experts" in options else "cpu"
    work = (
        ServerWork(arguments.model, options, arguments.clients)
        if arguments.server
        else EngineWork(arguments.model, options)
    )
    pid = work.process.pid if isinstance(work, ServerWork) else os.getpid()
    if isinstance(work, ServerWork):
        atexit.register(work.process.__exit__)  # where a round fails
    texts, rows = work.texts(), list[Usage]()
    print(
        "| minute | requests | blocks | anonymous | KV caches | tree | rest | children, MiB | threads | descriptors |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    warm = None
    while (minutes := (time.monotonic() - begun) / 60) < arguments.minutes:
        work.round(ROUND)
        row = usage(pid, work.held(), on_gpu=options["device"] == "cuda")
        rows.append(row)
        if warm is None and minutes >= arguments.warm_up:
            warm = len(rows) - 1
        print(
            f"| {(time.monotonic() - begun) / 60:.1f} | {work.done.total()} | {row.blocks} "
            f"| {row.anonymous:.1f} | {row.kv:.1f} | {row.tree:.1f} | {row.rest:.1f} | {row.children:.1f} "
            f"| {row.threads} | {row.descriptors} |",
            flush=True,
        )
    wrong = [] if work.texts() == texts else ["greedy or seeded text differs from that at the start"]
    wrong += growth(rows[warm or 0 :], arguments.bound)
    work.close()
    print(f"{dict(work.done)}")
    print("\n".join(["GREW OR CHANGED:", *wrong]) if wrong else "flat; greedy and seeded text as at the start")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Fuzzes what reads files and requests of strangers, guided by coverage (atheris, libFuzzer).

    python tests/fuzz/run.py --seconds 60 --seed 1            # all targets share the time
    python tests/fuzz/run.py gguf body --runs 100000          # executions of each, instead of seconds
    python tests/fuzz/run.py gguf-parts --seconds 600 --tiers all
    python tests/fuzz/run.py --seconds 3600 --jobs 16         # 16 workers of each target, seeds 1 to 16
    python tests/fuzz/run.py gguf --input crash-1234          # one input again, without the fuzzer

Every input must be read, or refused by one line (FiddlerError), within a second of processor time and without taking
memory of more than twice its size. The table says how often each target ran, how many edges of our code it reached,
its slowest input and the peak of the process's memory. An input that breaks a rule is written to --findings, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    *("gguf", "gguf-parts", "checkpoint", "tokenizer-json", "tokenizer-model", "jobs", "prompt-cache"),
    *("body", "template", "schema", "grammar", "http"),
)
MAX_SECONDS = {
    "gguf-parts": 20.0,  # computes; a tier's first model compiles its kernels, before the clock starts
    "http": 5.0,  # computes
}
DEFAULT_MAX_SECONDS = 1.0
SLACK = 64 << 20  # bytes that Python and the allocator may take beside an input
LARGEST = {"gguf": 1 << 17, "tokenizer-model": 1 << 14, "tokenizer-json": 1 << 15}  # bytes of an input
DEFAULT_LARGEST = 1 << 12
TESTS = Path(__file__).parents[1]


def load_targets(tiers: list[str]):
    """All targets, by name."""
    from fuzz.parts import available, parts_target
    from fuzz.targets import TARGETS

    return {**TARGETS, "gguf-parts": parts_target(available() if tiers == ["all"] else tiers)}


class Checked:
    """Runs inputs within their limits; notes the slowest in a file, since libFuzzer ends the process by itself."""

    def __init__(self, target, folder: Path, slowest: Path | None) -> None:
        self._target, self._folder, self._slowest_file = target, folder, slowest
        self._limit = MAX_SECONDS.get(target.name, DEFAULT_MAX_SECONDS)
        self._slowest = 0.0

    def __call__(self, data: bytes) -> None:
        peak, begun = _peak(), time.process_time()
        self._target.run(data, self._folder)
        seconds = time.process_time() - begun
        assert seconds < self._limit, f"{seconds:.1f} s of processor time"
        grown = _peak() - peak
        assert self._target.name == "gguf-parts" or grown < SLACK + 2 * len(data), f"{grown >> 20} MiB"
        if seconds > self._slowest and self._slowest_file is not None:
            self._slowest = seconds
            self._slowest_file.write_bytes(struct.pack("<d", seconds))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def child(arguments: argparse.Namespace, options: list[str]) -> None:
    """Fuzz one target in this process."""
    import atheris

    from fiddler import kernels

    compiled = [
        each.name for each in pkgutil.walk_packages(kernels.__path__, "fiddler.kernels.")
    ]  # not from Python's code
    with atheris.instrument_imports(include=["fiddler"], exclude=compiled):
        targets = load_targets(arguments.tiers)
    target, folder, corpus = targets[arguments.child], Path(arguments.folder), Path(arguments.corpus)
    work = folder / "work"
    for i, seed in enumerate(target.seeds()):
        (folder / "seed").write_bytes(seed)
        (folder / "seed").replace(corpus / f"seed-{i}")  # whole, since other workers read it
        target.run(seed, work)  # whatever is imported or compiled once
    atheris.Setup([sys.argv[0], *options, str(corpus)], Checked(target, work, folder / "slowest"))
    atheris.Fuzz()


@dataclass(frozen=True)
class Figures:
    """Of one target: executions, edges of our code, the slowest input [s], peak memory [MB]."""

    executions: int
    edges: int
    slowest: float
    peak: int

    def row(self, name: str, seconds: float) -> str:
        """A row of the table; seconds: of processor time that all workers took, with seeds, imports and children."""
        each = f"{self.executions:,} | {self.executions / seconds:,.0f} | {self.edges}"
        return f"| {name} | {each} | {self.slowest * 1e3:.0f} | {self.peak} |"


def merged(figures: list[Figures]) -> Figures:
    """Figures of all workers of a target: they share their corpus, so the one with most edges has nearly all."""
    executions = sum(each.executions for each in figures)
    slowest, edges = max(each.slowest for each in figures), max(each.edges for each in figures)
    return Figures(executions, edges, slowest, max(each.peak for each in figures))


def fuzz(name: str, arguments: argparse.Namespace, seconds: int) -> Figures | None:
    """Fuzz one target in processes of their own, with seeds one apart; None where something was found, which it prints.

    Each worker begins with the corpus that the others have made so far, and reads what they add.
    """
    with tempfile.TemporaryDirectory() as folder:
        (corpus := Path(folder) / "corpus").mkdir()
        workers = [_Worker(name, arguments, seconds, Path(folder), corpus, number) for number in range(arguments.jobs)]
        figures = [worker.figures() for worker in workers]
    found = [each for each in figures if each is not None]
    return merged(found) if len(found) == len(figures) else None


class _Worker:
    """A process that fuzzes."""

    def __init__(
        self, name: str, arguments: argparse.Namespace, seconds: int, folder: Path, corpus: Path, number: int
    ) -> None:
        self._name, self._folder = name, folder / f"worker-{number}"
        (self._folder / "work").mkdir(parents=True)
        seed = arguments.seed + number
        options = [f"-seed={seed}", "-print_final_stats=1", "-timeout=60", "-rss_limit_mb=4096", "-reload=10"]
        options += [f"-max_len={LARGEST.get(name, DEFAULT_LARGEST)}", f"-artifact_prefix={arguments.findings}/{name}-"]
        options += [f"-runs={arguments.runs}"] if arguments.runs else [f"-max_total_time={seconds}"]
        command = [sys.executable, __file__, "--child", name, "--folder", self._folder, "--corpus", corpus]
        command += ["--tiers", *arguments.tiers, "--", *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "FIDDLER_DEVICE": "cpu"}
        self._output = (self._folder / "output").open("w+", errors="replace")
        self._process = subprocess.Popen(command, env=environment, stdout=self._output, stderr=subprocess.STDOUT)

    def figures(self) -> Figures | None:
        """Wait for the end; None for a finding or a failure, whose output is printed."""
        code = self._process.wait()
        self._output.seek(0)
        output = self._output.read()
        self._output.close()
        slowest = self._folder / "slowest"
        runs, peak = (
            re.findall(rf"stat::{key}:\s+(\d+)", output) for key in ("number_of_executed_units", "peak_rss_mb")
        )
        edges = re.findall(r"cov: (\d+)", output)
        if code or not runs:
            print(f"| {self._name} | finding or failure, exit code {code} |\n{output[-3000:]}", flush=True)
            return None
        seconds = struct.unpack("<d", slowest.read_bytes())[0] if slowest.exists() else 0.0
        return Figures(int(runs[0]), int(edges[-1]), seconds, int(peak[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(NAMES)}; all where none is named")
    parser.add_argument("--seconds", type=int, default=60, help="of all targets together")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1, help="of the first worker")
    parser.add_argument("--jobs", type=int, default=1, help="workers of a target at once, with seeds one apart")
    parser.add_argument("--tiers", nargs="+", default=["avx2"], help="kernel tiers of gguf-parts, or all")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()), help="folder for bad inputs")
    parser.add_argument("--input", type=Path, help="run this one input of the one target that is named")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    own, options = (sys.argv[1:], []) if "--" not in sys.argv else _parted(sys.argv[1:])
    arguments = parser.parse_args(own)
    if arguments.child:
        child(arguments, options)
        return
    names = arguments.targets or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"{unknown[0]!r} is no target; give {', '.join(NAMES)}")
    if arguments.input:
        sys.path.insert(0, str(TESTS))
        with tempfile.TemporaryDirectory() as folder:
            print(load_targets(arguments.tiers)[names[0]].run(arguments.input.read_bytes(), Path(folder)) or "read")
        return
    arguments.findings.mkdir(parents=True, exist_ok=True)
    print(f"seeds {arguments.seed} to {arguments.seed + arguments.jobs - 1}, {arguments.jobs} at once", flush=True)
    print("| target | executions | a second of a core | edges | slowest, ms | peak memory, MB |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    total, clean, begun, computed = 0, True, time.monotonic(), _computed()
    for name in names:
        started = _computed()
        figures = fuzz(name, arguments, max(1, arguments.seconds // len(names)))
        clean = clean and figures is not None
        if figures is not None:
            total += figures.executions
            print(figures.row(name, _computed() - started), flush=True)
    computed, seconds = _computed() - computed, time.monotonic() - begun
    print(
        f"{total:,} executions in {seconds:.0f} s, {computed:.0f} s of a core: {total / computed:,.0f} a second of it"
    )
    sys.exit(0 if clean else 1)


def _computed() -> float:
    """Processor time of the workers that have ended [s]."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    main()

"""Runs every command that writes, its output on a full disk or no regular file: `full_disk.py FOLDER MODEL`.

FOLDER/disk becomes a tmpfs of 64 KiB in a mount namespace of this process, FOLDER/results.json says of every case the
exit code, what was printed, which files changed and which are new. Needs `unshare -rm` (user namespaces) or root, which
`may_mount` finds out. All cases run in one process, since each would import torch again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
DISK = "disk"
UNSHARE = ["unshare", "--map-root-user", "--mount"]
MOUNT = ["mount", "-t", "tmpfs", "-o", "size=64k", "none"]
LONG_ID = "a" * 3900  # results of a page each, so that the next one does not fit into the last page of the file

Usage = namedtuple("Usage", "total used free")


def may_mount(folder):
    """Why no disk can be mounted here, in a few words; None if one can."""
    try:
        done = subprocess.run([*UNSHARE, *MOUNT, folder], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or "refused"


def in_a_namespace(folder, model):
    """Run this file in a mount namespace of its own; return its results, by case."""
    (folder / DISK).mkdir()
    command = [*UNSHARE, sys.executable, __file__, folder, model]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


@contextmanager
def redirected(out, errors):
    """stdout and stderr go to these files."""
    saved = os.dup(1), os.dup(2)
    for path, descriptor in ((out, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        yield
    finally:
        for stream, descriptor, old in ((sys.stdout, 1, saved[0]), (sys.stderr, 2, saved[1])):
            stream.flush()
            os.dup2(old, descriptor)
            os.close(old)


def fiddler(*arguments):
    """The exit code of the command line in this process."""
    from fiddler.cli.app import main

    sys.argv = ["fiddler", *map(str, arguments)]
    try:
        main()
    except SystemExit as left:
        return left.code


class Disk:
    """A small disk that is filled up, and what a command does to its files."""

    def __init__(self, folder):
        self.folder, self.path, self.results = folder, folder / DISK, {}
        subprocess.run([*MOUNT, self.path], check=True)

    def fill(self):
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def files(self):
        return {str(p.relative_to(self.path)): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}

    def empty(self):
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def case(self, name, run, *, earlier=None, out=None):
        """Run on the full disk; `earlier`: contents of files that are there already. The disk is empty afterwards."""
        for file, content in (earlier or {}).items():
            (self.path / file).write_bytes(content)
        self.fill()
        before, started = self.files(), time.perf_counter()
        printed, errors = self.folder / "stdout", self.folder / "stderr"
        printed.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)
        with redirected(out or printed, errors):
            code = run()
        after = self.files()
        self.results[name] = {
            "code": code,
            "seconds": round(time.perf_counter() - started, 2),
            "errors": errors.read_text(),
            "changed": sorted(file for file in before if after.get(file) != before[file]),
            "new": sorted(after.keys() - before.keys()),
        }
        self.empty()


def write_commands(disk, model):
    """Each option or argument that names an output."""
    from fiddler import kernels
    from fiddler.evaluation import kernel_throughput

    kernel_throughput._CACHES = 0  # the model is too small to measure
    kernels.read_bandwidth = lambda *_: 1e9
    out, old = disk.path / "out", {"out": b"PRECIOUS\n"}
    prompt = ["run", model, "-p", "The old fiddler lived", "-n", "2"]
    probs = [*prompt, "--n-probs", "1", "--probs-file", out]
    disk.case("run --probs-file", lambda: fiddler(*probs), earlier=old)
    disk.case("run --probs-file, new", lambda: fiddler(*probs))
    trace = ["bench", model, "-p", "4", "-n", "2", "-r", "1", "--trace", out]
    disk.case("bench --trace", lambda: fiddler(*trace), earlier=old)
    plot = [
        "bench",
        model,
        "--kernels",
        "--tiers",
        kernels.choose_tier().name,
        "--tokens",
        "1",
        "--types",
        "bf16",
        "-r",
        "1",
        "--plot",
        out,
    ]
    disk.case("bench --plot", lambda: fiddler(*plot), earlier=old)
    counts = ["perplexity", model, "-f", disk.folder / "text", "-c", "16", "--expert-counts", out]
    (disk.folder / "text").write_text("The old fiddler lived at the end of the village. " * 3)
    assert fiddler(*counts) == 0
    disk.case("perplexity --expert-counts", lambda: fiddler(*counts), earlier={"out": out.read_bytes()})
    cache = [*prompt, "--prompt-cache", out]
    assert fiddler("run", model, "-p", "The", "-n", "1", "--prompt-cache", out) == 0
    cached = {"out": out.read_bytes()}
    disk.case("run --prompt-cache", lambda: fiddler(*cache), earlier=cached)
    disk.case("run --prompt-cache, full meanwhile", lambda: full_meanwhile(*cache), earlier=cached)
    (disk.folder / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"{number}{LONG_ID}", "prompt": "The", "max_tokens": 1}) + "\n" for number in (1, 2))
    )
    answer = {"id": f"1{LONG_ID}", "text": "", "finish_reason": "stop", "prompt_tokens": 1, "generated_tokens": 1}
    batch = ["batch", disk.folder / "in.jsonl", out, "-m", model]
    disk.case("batch", lambda: fiddler(*batch), earlier={"out": (json.dumps(answer) + "\n").encode()})
    convert = ["convert", DATA / "tiny", out]
    disk.case("convert", lambda: fiddler(*convert))
    disk.case("convert --force", lambda: fiddler(*convert, "--force"), earlier=old)
    disk.case("convert --force, full meanwhile", lambda: full_meanwhile(*convert, "--force"), earlier=old)
    convert_gguf = ["convert", old_mixtral(disk.folder, model), out]
    for name, arguments in (
        ("convert --type", [*convert, "--type", "Q8_0"]),
        ("convert IN.gguf", convert_gguf),
        ("quantize", ["quantize", model, out, "--type", "Q8_0"]),
    ):
        disk.case(name, lambda arguments=arguments: fiddler(*arguments))
        forced = [*arguments, "--force"]
        disk.case(f"{name} --force, full meanwhile", lambda forced=forced: full_meanwhile(*forced), earlier=old)


def old_mixtral(folder, model):
    """A GGUF with a tensor an expert, which `convert` takes."""
    from old_mixtral import write_old_mixtral

    return write_old_mixtral(model, folder / "old.gguf")


def special_outputs(disk, model):
    """Outputs that are no regular files: the null device, and a pipe that nobody reads."""
    pipe = disk.folder / "pipe"
    os.mkfifo(pipe)
    prompt = ["run", model, "-p", "The", "-n", "1"]
    commands = {
        "run --probs-file": [*prompt, "--n-probs", "1", "--probs-file"],
        "run --prompt-cache": [*prompt, "--prompt-cache"],
        "bench --trace": ["bench", model, "-p", "4", "-n", "0", "-r", "1", "--trace"],
        "bench --plot": ["bench", model, "--kernels", "--tokens", "1", "-r", "1", "--plot"],
        "perplexity --expert-counts": ["perplexity", model, "-f", disk.folder / "text", "-c", "16", "--expert-counts"],
        "batch": ["batch", "-m", model, disk.folder / "in.jsonl"],
        "convert": ["convert", DATA / "tiny"],
        "convert --type": ["convert", "--type", "Q8_0", DATA / "tiny"],
        "convert IN.gguf": ["convert", disk.folder / "old.gguf"],
        "quantize": ["quantize", "--type", "Q8_0", model],
    }
    for name, arguments in commands.items():
        disk.case(f"{name} > pipe", lambda arguments=arguments: fiddler(*arguments, pipe))
        if name != "bench --plot":  # which measures for long
            disk.case(f"{name} > null", lambda arguments=arguments: fiddler(*arguments, "/dev/null"))


def full_meanwhile(*arguments):
    """The disk has room when it is asked, and none later."""
    real, shutil.disk_usage = shutil.disk_usage, lambda path: Usage(1 << 40, 0, 1 << 40)
    try:
        return fiddler(*arguments)
    finally:
        shutil.disk_usage = real


def save_a_chat(disk, model):
    from fiddler import load
    from fiddler.chat import Chat
    from fiddler.cli.chat import _obey

    chat = Chat(load(model, device="cpu"))
    disk.case("chat /save", lambda: _obey(chat, f"/save {disk.path / 'saved'}", str))


def write_caches(disk, model):
    """Calibrations and kernel settings, which lie in the cache folder."""
    from fiddler.kernels.machine import tuning

    os.environ["XDG_CACHE_HOME"] = str(disk.path)
    calibrate = ["calibrate", model, "--device", "cpu", "-t", "1"]
    assert fiddler(*calibrate) == 0
    stored = {path.name: path.read_bytes() for path in (disk.path / "fiddler").glob("calibration-*")}
    (calibration,) = stored
    earlier = {f"fiddler/{calibration}": stored[calibration], "fiddler/tuning.json": b"{}"}
    for name, arguments in (("calibrate", calibrate), ("calibrate --kernels", ["calibrate", "--kernels"])):
        (disk.path / "fiddler").mkdir(exist_ok=True)
        disk.case(name, lambda arguments=arguments: fiddler(*arguments), earlier=earlier)

    def store():
        try:
            tuning.store_tuning(tuning.TUNINGS["zen3"])
        except OSError as error:
            return error.strerror

    (disk.path / "fiddler").mkdir(exist_ok=True)
    disk.case("kernel settings", store, earlier=earlier)
    batch = ["batch", disk.folder / "in.jsonl", disk.folder / "results", "-m", model]
    os.environ["FIDDLER_TUNING"] = "portable"  # a CPU in no family would have a second file to store, and a warning
    disk.case("seconds of steps", lambda: fiddler(*batch))
    del os.environ["XDG_CACHE_HOME"], os.environ["FIDDLER_TUNING"]


def print_results(disk, model):
    """stdout on a full disk."""
    for name, arguments in {
        "--help": ["--help"],
        "--version": ["--version"],
        "run": ["run", model, "-p", "The", "-n", "2"],
        "run --beams": ["run", model, "-p", "The", "-n", "2", "--beams", "2"],
        "bench": ["bench", model, "-p", "4", "-n", "0", "-r", "1"],
        "perplexity": ["perplexity", model, "-f", disk.folder / "text", "-c", "16"],
        "inspect": ["inspect", model],
        "inspect --json": ["inspect", model, "--json"],
        "calibrate": ["calibrate", model, "--device", "cpu", "-t", "1"],
        "calibrate --show": ["calibrate", "--show"],
        "serve": ["serve", model, "--port", "0"],
    }.items():
        disk.case(f"{name} > full", lambda arguments=arguments: fiddler(*arguments), out="/dev/full")


def main(folder, model):
    os.environ["FIDDLER_DEVICE"] = "cpu"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    disk = Disk(folder)
    with redirected(os.devnull, os.devnull):
        write_commands(disk, model)
        special_outputs(disk, model)
        save_a_chat(disk, model)
        write_caches(disk, model)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        print_results(disk, model)
    (folder / "results.json").write_text(json.dumps(disk.results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())

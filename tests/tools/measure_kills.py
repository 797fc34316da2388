"""Kills `fiddler convert` or `quantize` with SIGKILL at random moments, and lists what is left in the target's folder.

    python tests/tools/measure_kills.py --gigabytes 2 --kills 20 [--quantize]

makes a random Mixtral of that size in a temporary folder, converts it twice to learn how long that takes, then kills as
many conversions, every second one with --force over an existing file. Exits 1 where a kill left a file, or changed the
existing one. `--named` does the same as on a file system whose files all have names: there a kill leaves one temporary
file, and the next conversion must remove it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TINY = Path(__file__).parents[1] / "data" / "tiny"
OLD = b"what was there before"
PIECE = 1 << 24  # numbers written at once
NAMED = """
import errno, os
real_open = os.open
def refuse_nameless(path, flags, *mode):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    return real_open(path, flags, *mode)
os.open = refuse_nameless
"""
MAIN = "from fiddler.cli.app import main; main()"


def write_checkpoint(folder, nbytes, seed=0):
    """A Hugging Face folder of a random Mixtral of about `nbytes` bytes, with the tokenizer of `data/tiny`."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((TINY / "config.json").read_text())
    vocabulary, layers, experts = config["vocab_size"], 4, 8
    d = 256
    while layers * experts * 3 * d * 3 * d * 2 < 0.9 * nbytes and d < 2048:
        d += 256
    f = max(64, round(nbytes / (layers * experts * 3 * d * 2) / 32) * 32)
    config |= {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_local_experts": experts}
    config |= {"num_attention_heads": d // 64, "num_key_value_heads": d // 128, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "model.embed_tokens.weight": (vocabulary, d),
        "lm_head.weight": (vocabulary, d),
        "model.norm.weight": (d,),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for projection, rows in (("q", d), ("k", d // 2), ("v", d // 2), ("o", d)):
            shapes[f"{name}.self_attn.{projection}_proj.weight"] = (rows, d)
        shapes[f"{name}.block_sparse_moe.gate.weight"] = (experts, d)
        for expert in range(experts):
            for part, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                shapes[f"{name}.block_sparse_moe.experts.{expert}.{part}.weight"] = shape
    write_bf16(folder / "model.safetensors", shapes, np.random.default_rng(seed))


def write_bf16(path, shapes, numbers):
    """Random bfloat16 numbers between 2^-8 and 2^-6 of either sign, as a safetensors file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end // 2
        while left:
            count = min(left, PIECE)
            file.write(numbers.integers(0, 1 << 16, count, np.uint16) & 0x80FF | 0x3B80)
            left -= count


def command(source, target, *, named, force):
    code = NAMED + MAIN if named else MAIN
    verb = ["convert", source, target] if source.is_dir() else ["quantize", source, target, "--type", "Q8_0"]
    return [sys.executable, "-c", code, *verb, *(["--force"] if force else [])]


def kill_after(seconds, arguments):
    """Whether the conversion was still running when it was killed."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(seconds)
        running = process.poll() is None
        process.kill()
    return running


def kills(folder, source, count, seed, *, named=False, earliest=0.3):
    """Yield of every kill: whether it came in time, its moment [s], and names and sizes [bytes] of what it left.

    Neither the complete target of a kill that came late counts as left, nor an existing file that is as it was.
    earliest: the first moment, as a share of a whole conversion's time: before it, the process only imports.
    """
    numbers, target, complete = random.Random(seed), folder / "out.gguf", folder.with_suffix(".gguf")
    folder.mkdir()
    whole = float("inf")
    for _ in range(2):  # the first one reads the source from the disk
        started = time.perf_counter()
        subprocess.run(command(source, target, named=named, force=False), check=True, stderr=subprocess.DEVNULL)
        whole = min(whole, time.perf_counter() - started)
        target.replace(complete)
    for number in range(count):
        force = number % 2 == 1
        if force:
            target.write_bytes(OLD)
        moment = numbers.uniform(earliest, 1.0) * whole
        running = kill_after(moment, command(source, target, named=named, force=force))
        left = {path.name: path.stat().st_size for path in folder.iterdir()}
        if target.exists() and filecmp.cmp(target, complete, shallow=False):
            running = False
            del left[target.name]
        elif force and target.read_bytes() == OLD:
            del left[target.name]
        yield running, moment, left
        target.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--quantize", action="store_true", help="kill `quantize` of the converted model")
    options = parser.parse_args()
    failed = in_time = 0
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        source, folder = Path(name) / "hf", Path(name) / "out"
        write_checkpoint(source, int(options.gigabytes * 1e9))
        size = (source / "model.safetensors").stat().st_size
        print(f"checkpoint of {size / 1e9:.2f} GB", flush=True)
        if options.quantize:
            converted = Path(name) / "source.gguf"
            subprocess.run(command(source, converted, named=False, force=False), check=True)
            source = converted
        for running, moment, left in kills(folder, source, options.kills, options.seed, named=options.named):
            in_time += running
            allowed = options.named and len(left) <= 1 and all(path.endswith(".tmp") for path in left)
            failed += bool(left and not allowed)
            print(f"{moment:6.2f} s: {'killed' if running else 'was complete'}, left: {left or 'nothing'}", flush=True)
    print(f"{in_time} of {options.kills} killed in time; {failed} of them left what they must not")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Memory and speed of some layers of Mixtral-8x7B's shape: `python tests/tools/measure_memory.py convert`.

Not a test that pytest collects: each layer needs 6 GB of disk while it runs. Every sub-command writes its model to
a temporary directory and runs `fiddler` on it in a process of its own, whose memory is sampled.
The figure is RssAnon of /proc/PID/status: the process's own memory, without the pages of mapped files, which the
kernel takes back at will. Needs the `dev` extra, for the tokenizer in mistral-common.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.synthetic import with_context

D, F, E, H, G, V = 4096, 14336, 8, 32, 8, 32000
HEAD_DIM = D // H
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": F,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": H,
    "num_experts_per_tok": 2,
    "num_key_value_heads": G,
    "num_local_experts": E,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": V,
}
SAMPLING_SECONDS = 0.005
SPREAD = 10  # between the peaks for different numbers of layers [MB]


# --- models -----------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write a Hugging Face folder of `layers` layers: a shard for each, and one for the other tensors."""
    folder.mkdir()
    shards = [layer_shapes(index) for index in range(layers)]
    shards.append({"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)})
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shapes, seed=number)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    shutil.copy(mistral_vocabulary(), folder / "tokenizer.model")


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    layer = f"model.layers.{index}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.self_attn.q_proj.weight": (H * HEAD_DIM, D),
        f"{layer}.self_attn.k_proj.weight": (G * HEAD_DIM, D),
        f"{layer}.self_attn.v_proj.weight": (G * HEAD_DIM, D),
        f"{layer}.self_attn.o_proj.weight": (D, H * HEAD_DIM),
        f"{layer}.post_attention_layernorm.weight": (D,),
        f"{layer}.block_sparse_moe.gate.weight": (E, D),
    }
    for expert in range(E):
        prefix = f"{layer}.block_sparse_moe.experts.{expert}"
        shapes |= {f"{prefix}.w1.weight": (F, D), f"{prefix}.w2.weight": (D, F), f"{prefix}.w3.weight": (F, D)}
    return shapes


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Stream random bfloat16 values as large as a trained model's to a shard; norms are ones."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + 2 * prod(shape))}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        noise = endless_noise(seed)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(np.full(shape, 0x3F80, np.uint16).data)
                continue
            missing = prod(shape)
            while missing:
                piece = next(noise)[:missing]
                file.write(piece.data)
                missing -= len(piece)


def endless_noise(seed: int) -> Iterator[np.ndarray]:
    """Slices of one pool of bfloat16 bits, from a random offset each time."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(1 << 24, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    while True:
        yield pool[random.integers(1 << 20) :]


def mistral_vocabulary() -> Path:
    """The path of Mixtral's tokenizer.model in the mistral-common package."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        sys.exit("mistral-common is missing; install the dev extra")
    return Path(found.origin).parent / "data" / "tokenizer.model.v1"


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Resources of one process: wall clock [seconds] and peak RssAnon [bytes]."""

    seconds: float
    peak: int


def run_measured(command: Sequence[str | Path]) -> Usage:
    """Run `command` and sample its memory until it ends; exits where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLING_SECONDS)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return Usage(time.perf_counter() - started, peak)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process [bytes]; 0 where it is about to end."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def say_row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(f"{cell!s:>12}" for cell in cells) + " |", flush=True)


# --- sub-commands -----------------------------------------------------------------------------------------------


def convert(arguments: argparse.Namespace) -> bool:
    """Convert each number of layers; return whether memory stayed under the limit and did not grow with them."""
    say_row(["layers", "file GB", "seconds", "GB/s", "RssAnon MB"])
    say_row(["---:"] * 5)
    peaks = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            source, target = Path(scratch) / "hf", Path(scratch) / "out.gguf"
            write_checkpoint(source, layers)
            options = ["--dtype", arguments.dtype] if arguments.dtype else []
            usage = run_measured([sys.executable, "-m", "fiddler", "convert", source, target, *options])
            gigabytes = target.stat().st_size / 1e9
        speed = f"{gigabytes / usage.seconds:.2f}"
        say_row([layers, f"{gigabytes:.2f}", f"{usage.seconds:.1f}", speed, f"{usage.peak / 1e6:.0f}"])
        peaks.append(usage.peak)
    return max(peaks) < arguments.limit * 1e6 and max(peaks) - min(peaks) <= SPREAD * 1e6


RUN = """
import json, sys, time
import fiddler.loading, fiddler.engine, fiddler.cpu.loader, fiddler.kernels as kernels  # the bare imports: torch, numba
kernels.precompile(kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16"))
from fiddler.host_memory import peak_memory
imported = peak_memory().anonymous
started = time.perf_counter()
engine = fiddler.loading.load(sys.argv[1])
opened, loaded = time.perf_counter() - started, peak_memory().anonymous
completion = engine.generate("Once upon a time" * int(sys.argv[2]), max_tokens=int(sys.argv[3]), ignore_eos=True)
print(json.dumps({
    "open_seconds": opened, "imported": imported, "loaded": loaded, "generated": peak_memory().anonymous,
    "prompt_tokens": completion.stats.prompt_tokens, "prompt_speed": completion.stats.prompt_speed,
    "speed": completion.stats.generation_speed,
}))
"""


def run(arguments: argparse.Namespace) -> bool:
    """Open a model and generate in fast precision; return whether it opened in time and its memory stayed small."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "model.gguf"
        write_checkpoint(source, arguments.layers)
        subprocess.run([sys.executable, "-m", "fiddler", "convert", source, target], check=True)
        shutil.rmtree(source)
        command = [sys.executable, "-c", RUN, target, str(arguments.repeat), str(arguments.tokens)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # compiles the kernels, reads the file
        answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        gigabytes = target.stat().st_size / 1e9
    grown = answer["generated"] - answer["imported"]
    say_row(["layers", "file GB", "open s", "RssAnon MB", "grown MB", "prompt t/s", "gen t/s"])
    say_row(["---:"] * 7)
    say_row(
        [
            arguments.layers,
            f"{gigabytes:.2f}",
            f"{answer['open_seconds']:.3f}",
            f"{answer['generated'] / 1e6:.0f}",
            f"{grown / 1e6:.0f}",
            f"{answer['prompt_speed']:.1f}",
            f"{answer['speed']:.2f}",
        ]
    )
    return bool(grown < arguments.limit * 1e6 and answer["open_seconds"] <= arguments.open_limit)


PREFILL = """
import json, random, sys, threading, time
import fiddler.loading
from fiddler.host_memory import peak_memory
count = int(sys.argv[2])
engine = fiddler.loading.load(sys.argv[1], device="cpu", context=count, precision=sys.argv[3])
ids = [random.Random(0).randrange(3, engine.config.vocab_size) for _ in range(count)]
loaded, samples, done = peak_memory().anonymous, [], threading.Event()
def sample():
    while not done.wait(0.005):
        samples.append(peak_memory().anonymous)
thread = threading.Thread(target=sample)
thread.start()
sequence, started = engine.runner.sequence(), time.perf_counter()
engine.runner.prefill(sequence, ids)
seconds = time.perf_counter() - started
done.set()
thread.join()
kv_bytes = engine.runner.kv_bytes(count)
print(json.dumps({"seconds": seconds, "kv_bytes": kv_bytes, "grown": max(samples) - loaded}))
"""


def measured_prefill(model: Path, tokens: int, precision: str) -> dict[str, float]:
    """Prefill in a process of its own: seconds, KV cache [bytes] and the peak growth of RssAnon [bytes]."""
    command = [sys.executable, "-c", PREFILL, str(model), str(tokens), precision]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def prefill(arguments: argparse.Namespace) -> bool:
    """Prefill with the demo model, its context raised; return whether memory beyond the KV cache stayed small."""
    from fiddler.loading import DEMO_MODEL

    say_row(["tokens", "seconds", "tokens/s", "KV cache MB", "grown MB", "beyond MB"])
    say_row(["---:"] * 6)
    beyond = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        model = with_context(arguments.model or DEMO_MODEL, Path(scratch) / "long.gguf", max(arguments.tokens))
        measured_prefill(model, 16, arguments.precision)  # compiles the kernels
        for tokens in arguments.tokens:
            usage = measured_prefill(model, tokens, arguments.precision)
            beyond.append((usage["grown"] - usage["kv_bytes"]) / 1e6)
            sizes = [f"{size / 1e6:.0f}" for size in (usage["kv_bytes"], usage["grown"])]
            speed = f"{tokens / usage['seconds']:.0f}"
            say_row([tokens, f"{usage['seconds']:.1f}", speed, *sizes, f"{beyond[-1]:.0f}"])
    return max(beyond) < arguments.limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert", help="convert a checkpoint of some layers")
    command.set_defaults(function=convert)
    command.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    command.add_argument("--dtype", choices=["bf16", "f16"], help="default: the checkpoint's, bf16")
    command.add_argument("--limit", type=int, default=1000, metavar="MB", help="exit with 1 above this (1000)")
    command.add_argument("--directory", type=Path, help="where to put some 6 GB a layer (default: the temporary one)")
    command = commands.add_parser("run", help="open a model of some layers and generate")
    command.set_defaults(function=run)
    command.add_argument("--layers", type=int, default=2)
    command.add_argument("--repeat", type=int, default=100, help="length of the prompt, in once-upon-a-times (100)")
    command.add_argument("--tokens", type=int, default=16, help="tokens to generate (16)")
    command.add_argument("--limit", type=int, default=400, metavar="MB", help="exit with 1 if it grew by more (400)")
    command.add_argument("--open-limit", type=float, default=0.2, metavar="S", help="exit with 1 if slower (0.2)")
    command.add_argument("--directory", type=Path, help="where to put some 6 GB a layer (default: the temporary one)")
    command = commands.add_parser("prefill", help="read long prompts with the demo model")
    command.set_defaults(function=prefill)
    command.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    command.add_argument("--precision", choices=["fast", "exact"], default="fast")
    command.add_argument("--model", type=Path, metavar="MODEL.gguf", help="another model, of which a copy is made")
    command.add_argument("--limit", type=int, default=300, metavar="MB", help="exit with 1 if it took more (300)")
    command.add_argument("--directory", type=Path, help="where to put the copy (default: the temporary one)")
    arguments = parser.parse_args()
    sys.exit(0 if arguments.function(arguments) else 1)


if __name__ == "__main__":
    main()

"""Is the expert kernel slower than torch's linears on the same mapped weights? `python tests/tools/compare_torch.py`.

Not a test that pytest collects: it needs 7 GB of disk for one layer at the shape of Mixtral-8x7B, or a model. Both
sides read bfloat16 weights in the mapped file and round activations to bfloat16, in turns and with other experts each
time. Exits with 1 where the kernel is the slower one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler import kernels
from fiddler.files.gguf_file import GgufFile

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from tools.measure_memory import say_row, write_checkpoint

TOKENS = [1, 4, 16, 64, 128, 512]
USED = 2  # experts a token
AGREEMENT = 0.02  # both round to bfloat16, torch also the results of its linears

Layer = Callable[
    [np.ndarray, np.ndarray, np.ndarray], np.ndarray
]  # x [T, D], expert_ids [T, K], routing_weights [T, K] -> [T, D]


@contextmanager
def model_to_measure(model: Path | None, directory: Path | None) -> Iterator[Path]:
    """`model`, or else a temporary model of one layer with random weights."""
    if model is not None:
        yield model
        return
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "model.gguf"
        write_checkpoint(source, layers=1)
        subprocess.run([sys.executable, "-m", "fiddler", "convert", source, target], check=True)
        shutil.rmtree(source)
        yield target


def expert_weights(path: Path) -> list[np.ndarray]:
    """Gate, up and down of the first layer, bfloat16 bits in the mapping; read once: then every page is mapped."""
    file = GgufFile.open(path)
    names = [f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
    arrays = [file.array(name) for name in names]
    if any(file.tensors[name].type != "BF16" for name in names):
        sys.exit(f"{path}: the experts are not BF16")
    for array in arrays:
        for expert in array:
            expert.view(np.uint64).sum()
    return arrays


def kernel_layer(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Layer:
    variant = kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16")
    return lambda x, expert_ids, routing_weights: kernels.expert_ffn(
        x, expert_ids, routing_weights, gate, up, down, variant
    )


def torch_layer(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Layer:
    """The same layer in plain torch, one expert after the other."""
    gates, ups, downs = as_bfloat16(gate), as_bfloat16(up), as_bfloat16(down)

    def layer(x: np.ndarray, expert_ids: np.ndarray, routing_weights: np.ndarray) -> np.ndarray:
        rows, experts, weights = (
            torch.from_numpy(x).bfloat16(),
            torch.from_numpy(expert_ids),
            torch.from_numpy(routing_weights),
        )
        y = torch.zeros(x.shape)
        for expert in experts.unique().tolist():
            tokens, slots = (experts == expert).nonzero(as_tuple=True)
            inputs = rows[tokens]
            hidden = F.silu(F.linear(inputs, gates[expert])) * F.linear(inputs, ups[expert])
            output = F.linear(hidden, downs[expert]).float()
            y.index_add_(0, tokens, output * weights[tokens, slots, None])
        return y.numpy()

    return layer


def as_bfloat16(bits: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
        return torch.from_numpy(bits).view(torch.bfloat16)


def times(ours: Layer, theirs: Layer, tokens: int, shape: tuple[int, ...], repetitions: int) -> np.ndarray:
    """Seconds [repetitions, 2] of both on the same number of tokens; the first, unrecorded round compares results."""
    experts, _, width = shape
    random = np.random.default_rng(tokens)
    x = random.standard_normal((tokens, width)).astype(np.float32)
    first_ids = np.stack([random.permutation(experts)[:USED] for _ in range(tokens)])
    routing_weights = np.full((tokens, USED), 1 / USED, np.float32)
    with torch.inference_mode():
        our_output, their_output = ours(x, first_ids, routing_weights), theirs(x, first_ids, routing_weights)
        if not np.linalg.norm(our_output - their_output) < AGREEMENT * np.linalg.norm(their_output):
            sys.exit(f"{tokens} tokens: the kernel and torch differ")
        seconds = np.empty((repetitions, 2))
        for turn in range(2 * repetitions):
            expert_ids = (first_ids + USED * (turn + 1)) % experts  # never the experts of the turn before
            started = time.perf_counter()
            (ours, theirs)[turn % 2](x, expert_ids, routing_weights)
            seconds[turn // 2, turn % 2] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF with BF16 experts (default: one made for the occasion)")
    parser.add_argument("--directory", type=Path, help="where to make it (default: the temporary one)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--limit", type=float, default=1.0, help="exit with 1 where torch/ours is below this (1.0)")
    arguments = parser.parse_args()
    kernels.set_threads(arguments.threads)
    torch.set_num_threads(kernels.thread_count())
    say_row(["tokens", "ours ms", "(min-max)", "torch ms", "(min-max)", "torch/ours"])
    say_row(["---:"] * 6)
    slowest = float("inf")
    with model_to_measure(arguments.model, arguments.directory) as path:
        arrays = expert_weights(path)
        ours, theirs = kernel_layer(*arrays), torch_layer(*arrays)
        for tokens in arguments.tokens:
            seconds = times(ours, theirs, tokens, arrays[0].shape, arguments.repetitions)
            ratio = median(seconds[:, 1] / seconds[:, 0])
            cells = [
                cell for side in seconds.T * 1e3 for cell in (f"{median(side):.1f}", f"{min(side):.1f}-{max(side):.1f}")
            ]
            say_row([tokens, *cells, f"{ratio:.2f}"])
            slowest = min(slowest, ratio)
    sys.exit(0 if slowest >= arguments.limit else 1)


if __name__ == "__main__":
    main()

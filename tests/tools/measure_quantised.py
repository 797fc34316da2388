"""What quantising costs: `python tests/tools/measure_quantised.py MODEL.gguf TEXT [--types Q8_0 ...] [--llama BINARY]`.

Not a test that pytest collects. Prints a row for each type: perplexity in both precisions, as `fiddler perplexity`
computes it, and in llama.cpp on the same file where its `llama-perplexity` is given; the mean Kullback-Leibler
divergence [nats] of `exact` from the model in 16 bits over the scored positions; and how often the most probable token
is the same.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fiddler
from fiddler.converters.mixtures import MIXTURES
from fiddler.evaluation.perplexity import cut, losses


def scored(model: Path, precision: str, text: str, context: int, chunks: int) -> tuple[Tensor, float]:
    """Log-probabilities [n, V] at the scored positions, and the perplexity."""
    engine = fiddler.load(model, precision=precision, device="cpu", context=context)
    tokenizer = engine.tokenizer
    windows = cut(tokenizer.encode(text, add_bos=tokenizer.add_bos), context)[:chunks]
    rows, each = [], []
    for window in windows:
        inputs = [tokenizer.bos_id, *window[1:]] if tokenizer.add_bos else list(window)
        logits = engine.logits(inputs)[context // 2 : context - 1]
        each.append(losses(logits, window[context // 2 + 1 :]))
        rows.append(torch.log_softmax(logits.double(), -1))
    return torch.cat(rows), float(np.exp(np.concatenate(each).mean()))


def in_llama(binary: Path, model: Path, text: Path, context: int, chunks: int) -> float:
    """llama.cpp's perplexity."""
    command = [str(binary), "-m", str(model), "-f", str(text), "-c", str(context), "-b", str(context), "-t", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run([*command, "--no-repack", "--chunks", str(chunks)], **streams, text=True, errors="replace")
    # the last of the running estimates, where the line of the final one is missing
    found = re.findall(r"(?:Final estimate: PPL = |\[\d+\])([\d.]+)", result.stdout)
    if result.returncode or not found:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}: {result.stdout[-500:]}")
    return float(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="in 16 bits")
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("-c", "--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-perplexity")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    setting = text, arguments.ctx, arguments.chunks
    reference, plain = scored(arguments.model, "exact", *setting)
    probabilities, best = reference.exp(), reference.argmax(-1)
    print("| type | exact | fast | llama.cpp | divergence | same token |\n|---|---|---|---|---|---|")

    def row(name: str, model: Path) -> None:
        ours, exact = scored(model, "exact", *setting)
        _, fast = scored(model, "fast", *setting)
        divergence = float((probabilities * (reference - ours)).sum(-1).mean())
        same = float((ours.argmax(-1) == best).double().mean())
        theirs = "-"
        if arguments.llama is not None:
            theirs = f"{in_llama(arguments.llama, model, arguments.text, arguments.ctx, arguments.chunks):.4f}"
        print(f"| {name} | {exact:.4f} | {fast:.4f} | {theirs} | {divergence:.5f} | {100 * same:.1f} % |", flush=True)

    row("as it is", arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.types:
            target = Path(folder) / f"{name}.gguf"
            fiddler.convert(arguments.model, target, quantisation=name)
            row(name, target)
            target.unlink()
    print(f"{len(reference)} positions; perplexity in 16 bits {plain:.4f}")


if __name__ == "__main__":
    main()

"""Greedy text here and in llama.cpp: `python tests/tools/compare_llama.py MODEL.gguf --llama .../llama-simple`.

Not a test that pytest collects: it needs llama.cpp's `llama-simple`, built elsewhere. Ours computes in exact
precision; llama.cpp rounds activations to the weights' 16-bit type. Where the texts differ, the margin between our
two best tokens at that point says whether it is a rounding or a mistake.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fiddler

PROMPTS = [
    "Once upon a time",
    "The old farmer looked at the sky and",
    "Lily had a small red boat.",
    'One morning, the bear woke up and said, "',
    "There was a girl who could not sleep.",
    "In the middle of the forest",
    "The robot wanted to",
    '"Please help me," said the mouse',
    "Far away, behind the mountains,",
    "Tom and his grandmother",
]


def llama_text(binary: Path, model: Path, prompt: str, count: int) -> bytes:
    """llama.cpp's text after the prompt, in bytes: a random model's text is not UTF-8."""
    command = [str(binary), "-m", str(model), "-n", str(count), "-ngl", "0", prompt]
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.decode()[-500:]}")
    text = result.stdout.removesuffix(b"\n").split(prompt.encode(), 1)[-1]
    return text.replace(b"<unk>", b"")  # ours gives no text for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's llama-simple")
    parser.add_argument("-n", type=int, default=64, help="tokens to generate (64)")
    arguments = parser.parse_args()
    engine = fiddler.load(arguments.model, precision="exact")
    same = 0
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt, add_bos=engine.tokenizer.add_bos)
        ours = engine.generate(prompt, fiddler.Sampling(temperature=0.0), arguments.n)
        theirs = llama_text(arguments.llama, arguments.model, prompt, arguments.n)
        tokenizer = engine.tokenizer
        written = [tokenizer.decode_bytes([*ids, token])[len(tokenizer.decode_bytes(ids)) :] for token in ours.tokens]
        written = [text.replace(b"\0", b"") for text in written]  # llama-simple prints C strings
        if b"".join(written) == theirs:
            same += 1
            print(f"same      {len(ours.tokens):3} tokens  {prompt!r}")
            continue
        position = next(i for i in range(len(written)) if not theirs.startswith(b"".join(written[: i + 1])))
        logits = engine.logits([*ids, *ours.tokens[:position]])[-1]
        best = logits.topk(2)
        names = [tokenizer.token(int(token)) for token in best.indices]
        rest = theirs[len(b"".join(written[:position])) :][:12]
        print(
            f"different at token {position} of {len(written)}  {prompt!r}: theirs goes on {rest!r}; margin "
            f"{best.values[0] - best.values[1]:.4f} between {names[0]!r} and {names[1]!r}, deviation {logits.std():.2f}"
        )
    print(f"{same} of {len(PROMPTS)} texts are the same")


if __name__ == "__main__":
    main()

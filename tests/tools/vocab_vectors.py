"""Our ids on llama.cpp's own tokenizer vectors: each `models/ggml-vocab-*.gguf` with its `.inp` and `.out`.

    python tests/tools/vocab_vectors.py LLAMA_CPP_SOURCE

The vectors are the ids that the original tokenizers give. Vocabularies of kinds and pre-tokenizers that do not run are
named and passed over. Ends with 1 where some ids differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fiddler.errors import FileFormatError
from fiddler.files.gguf_file import GgufFile
from fiddler.text.tokenizer import Tokenizer

_SEPARATOR = "\n__ggml_vocab_test__\n"


def vectors(vocabulary: Path) -> list[tuple[str, list[int]]]:
    """The texts and ids beside a vocabulary."""
    texts = Path(f"{vocabulary}.inp").read_bytes().decode().split(_SEPARATOR)
    lines = Path(f"{vocabulary}.out").read_text(encoding="utf-8").splitlines()
    return [(text, [int(part) for part in line.split()]) for text, line in zip(texts, lines, strict=False)]


def differing(tokenizer: Tokenizer, pairs: list[tuple[str, list[int]]]) -> list[tuple[str, list[int], list[int]]]:
    """Text, ours and theirs, where the ids differ."""
    return [(text, ours, ids) for text, ids in pairs if (ours := tokenizer.encode(text)) != ids]


def main() -> int:
    """Run all vectors of the folder given; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of llama.cpp's source")
    wrong = 0
    for vocabulary in sorted((parser.parse_args().source / "models").glob("ggml-vocab-*.gguf")):
        name = vocabulary.stem.removeprefix("ggml-vocab-")
        try:
            tokenizer = Tokenizer.from_metadata(GgufFile.open(vocabulary).metadata)
        except FileFormatError as error:
            print(f"{name:16s} passed over: {str(error).partition(';')[0][-90:]}")
            continue
        if not Path(f"{vocabulary}.inp").exists():
            print(f"{name:16s} has no vectors")
            continue
        pairs = vectors(vocabulary)
        found = differing(tokenizer, pairs)
        broken = [text for text, ids in pairs if tokenizer.decode(ids) != text]
        print(f"{name:16s} {len(pairs) - len(found)} of {len(pairs)} equal; {len(broken)} do not decode to their text")
        for text, ours, theirs in found:
            print(f"    {text!r}: {ours} instead of {theirs}")
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Our ids after `convert` and those of the `tokenizers` library, for folders with a tokenizer.json.

    python tests/tools/compare_tokenizers.py FOLDER ...

Each folder holds tokenizer.json and, if it has one, tokenizer_config.json; weights are not read. Several thousand
texts (`oracles.texts`: scripts, emoji, blanks, control characters, digits) and as many with the folder's added tokens
in them. Ends with 1 where some ids differ, or some text does not come back.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.text.tokenizer import Tokenizer
from oracles.byte_level import through_a_file
from oracles.texts import texts

_COUNT = 4000


def strings(names: list[str]) -> list[str]:
    """Texts as they are, and texts with added tokens between them and cut off."""
    source, parts = random.Random(22), texts()
    cut = [name[: source.randrange(1, len(name) + 1)] for name in names]
    pools = (names, cut, parts, (" ", "\n", "  "))
    marked = ["".join(source.choice(source.choice(pools)) for _ in range(6)) for _ in range(_COUNT)]
    return [*parts, *marked]


def compared(folder: Path) -> int:
    """Print the figures of one folder; the number of texts that differ."""
    oracle = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    size = max(oracle.get_vocab().values()) + 1
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).exists():
                shutil.copy(folder / name, scratch)
        (Path(scratch) / "config.json").write_text(json.dumps({"vocab_size": size}))
        start = time.perf_counter()
        vocabulary = read_vocabulary(Path(scratch), size)
        read = time.perf_counter() - start
        _, metadata = through_a_file(vocabulary, Path(scratch) / "vocabulary.gguf")
    start = time.perf_counter()
    ours = Tokenizer.from_metadata(metadata)
    built = time.perf_counter() - start
    tried = strings([token.content for token in oracle.get_added_tokens_decoder().values()])
    wrong = [
        text
        for text in tried
        if ours.encode(text, parse_special=True) != oracle.encode(text, add_special_tokens=False).ids
    ]
    form = (lambda text: unicodedata.normalize("NFC", text)) if vocabulary.byte_level.nfc else str
    lost = [text for text in tried if ours.decode(ours.encode(text)) != form(text)]
    whole = [text for text in tried if not _streams(ours, text)]
    print(
        f"{folder}: {metadata['tokenizer.ggml.pre']}, {size} tokens; {len(tried) - len(wrong)} of {len(tried)} texts "
        f"have the library's ids; {len(lost)} do not come back, {len(whole)} not when streamed; "
        f"read in {read:.1f} s, built in {built:.1f} s"
    )
    for text in (*wrong[:5], *lost[:5]):
        print(f"    {text!a}")
    return len(wrong) + len(lost) + len(whole)


def _streams(tokenizer: Tokenizer, text: str) -> bool:
    ids, stream = tokenizer.encode(text), tokenizer.stream()
    return "".join([stream.push(index) for index in ids]) + stream.finish() == tokenizer.decode(ids)


def main() -> int:
    """Compare each folder given; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    return 1 if sum([compared(folder) for folder in parser.parse_args().folders]) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Chat templates rendered by ours and by transformers' `apply_chat_template`.

    python tests/tools/compare_templates.py PATH ...

PATH: a template in Jinja, a folder of them (`*.jinja`), or a folder with tokenizer.json, whose own template and whose
ids are compared. Conversations with and without tools, tool calls, reasoning and variables (`oracles.conversations`).
Ends with 1 where some text or some ids differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.text.chat_template import ChatTemplate, special_tokens
from fiddler.text.tokenizer import Tokenizer
from oracles.byte_level import through_a_file
from oracles.conversations import compare

_TINY = Path(__file__).parents[1] / "data" / "tiny"


def pair(folder: Path, template: str | None) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """transformers' tokenizer of a folder and ours, with its own template or the one given."""
    theirs = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.glob("*"):
            if path.suffix in (".json", ".jinja", ".model") and path.name != "config.json":
                shutil.copy(path, scratch)
        size = max(theirs.get_vocab().values()) + 1
        (Path(scratch) / "config.json").write_text(json.dumps({"vocab_size": size}))
        _, metadata = through_a_file(read_vocabulary(Path(scratch), size), Path(scratch) / "vocabulary.gguf")
    tokenizer = Tokenizer.from_metadata(metadata)
    if template is None:
        ours = ChatTemplate.of(tokenizer, metadata)
        assert ours is not None, f"{folder} has no chat template"
        return theirs, ours
    theirs.chat_template = template
    return theirs, ChatTemplate(template, tokenizer, special_tokens(tokenizer, metadata))


def compared(path: Path) -> int:
    """Print the figures of one path; the number of renderings that differ."""
    own = (path / "tokenizer.json").exists()
    theirs, ours = pair(path, None) if own else pair(_TINY, path.read_text(encoding="utf-8"))
    outcome = compare(theirs, ours, ids=own)
    ours.close()
    print(
        f"{path.name}: {outcome.equal} equal, {outcome.refused} fail in both, {outcome.other_form} fail in "
        f"transformers only, {len(outcome.differing)} differ",
        *outcome.differing[:8],
        sep="\n    ",
        flush=True,
    )
    return len(outcome.differing)


def main() -> int:
    """Compare each path given; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+")
    paths = []
    for path in parser.parse_args().paths:
        whole = path.is_file() or (path / "tokenizer.json").exists()
        paths += [path] if whole else sorted(path.glob("*.jinja"))
    return 1 if sum([compared(path) for path in paths]) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Have a small model write simple stories, keep the sound ones, and store them as plain text.

    python stories.py SmolLM2-135M-Instruct.Q4_1.gguf stories.txt --minutes 6

The file holds one story after another: paragraphs end with a newline, stories are separated by a blank line.
A few minutes of a large GPU give some hundred thousand stories. Without a GPU a handful takes a minute: it is
for trying.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import prompts
import smollm
import torch

PREFIX = "<|im_start|>user\n"
ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": " - ",
        "\u2014": " - ",
        "\u2026": "...",
        "\u00a0": " ",
    }
)
ODD = re.compile(r"[^\n -~]|[\[\]{}<>|\\/_*#=+@^~`$%&]|\d{3}|https?:")
ABOUT_ITSELF = re.compile(
    r"\b(this|the|our|my) (short )?(story|tale|book) "
    r"(is|was|ends|begins|teaches|shows|tells|takes place|has|of this|about)\b"
    r"|\b(AI|assistant|prompt|reader|readers|protagonist|narrator|characters?|in (the|this) (story|tale)"
    r"|sentence|sentences|words|title|language)\b"
    r"|\b(sex|sexual|sexy|naked|kill|killed|murder|blood|drunk|beer|wine|gun|suicide|rape|drugs?"
    r"|making love)\b",
    re.IGNORECASE,
)
HEADING = re.compile(r"^[^.!?\"]{0,60}:?$")
LAST_END = re.compile(r"^.*[.!?][\"']?(?=\s|$)", re.DOTALL)


def clean(text: str, complete: bool) -> str | None:
    """The story in `text` as ASCII paragraphs, or None where it is not worth keeping. Pure.

    A text that was cut off (`complete` false) loses its last, unfinished sentence.
    """
    text = text.translate(ASCII).replace("\r", "")
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in text.split("\n")]
    text = "\n".join(p for p in paragraphs if p and not HEADING.match(p))
    text = re.sub(r"^\(?The end\.?\)?$", "The end.", text, flags=re.MULTILINE | re.IGNORECASE)
    ends = LAST_END.match(text)
    if ends is None or (complete and len(text) - ends.end() > 80):
        return None
    text = ends.group()
    if ODD.search(text) or ABOUT_ITSELF.search(text) or text.count('"') % 2:
        return None
    words = re.findall(r"[A-Za-z']+", text.lower())
    if not 60 <= len(words) <= 400 or not (text[0] == '"' or text[0].isupper()):
        return None
    return text if is_lively(words) and is_lively_by_sentence(text) else None


def is_lively(words: list[str]) -> bool:
    """Whether a text moves on: few triples of words come twice, none often; no tiny vocabulary."""
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    often = max(Counter(triples).values(), default=0)
    doubled = any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2))
    return (
        len(set(triples)) >= 0.9 * len(triples)
        and often <= 4
        and not doubled
        and len(set(words)) >= min(0.4 * len(words), 60)
    )


def is_lively_by_sentence(text: str) -> bool:
    """No sentence comes three times, none runs on without end."""
    sentences = [s.strip().lower() for s in re.split(r"[.!?]+[\"']?\s", text) if s.strip()]
    return max(Counter(sentences).values(), default=0) < 3 and all(len(s.split()) <= 45 for s in sentences)


def clean_all(batch: list[tuple[str, bool]]) -> list[str]:
    """`clean` over (text, complete) pairs; what is left."""
    stories = (clean(text, complete) for text, complete in batch)
    return [story for story in stories if story is not None]


def main() -> None:
    """Write stories for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--minutes", type=float, default=6, help="how long to write, loading and compiling not counted")
    parser.add_argument("--texts", type=int, default=4096, help="texts in flight")
    parser.add_argument("--length", type=int, default=352, help="positions a text may have, with its prompt")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    fast = torch.cuda.is_available()
    model = smollm.load(arguments.model, "cuda" if fast else "cpu", torch.bfloat16 if fast else torch.float32)
    vocabulary = model.vocabulary
    shared = len(vocabulary.encode(PREFIX))

    def encoded() -> Iterator[tuple[list[int], str]]:
        for ask, opener in prompts.requests(arguments.seed):
            ids = vocabulary.encode(f"{PREFIX}{ask}<|im_end|>\n<|im_start|>assistant\n{opener}")
            if len(ids) < arguments.length // 2:
                yield ids, opener

    writer = smollm.Writer(model, arguments.texts, arguments.length, smollm.Manner(), fast)
    seen: set[int] = set()
    pending: list[Future[list[str]]] = []
    kept = characters = finished = ended = 0
    started = reported = 0.0
    with (
        ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool,
        arguments.out.open("w", encoding="ascii") as out,
    ):
        batch: list[tuple[str, bool]] = []

        def store(wait: bool) -> None:
            nonlocal kept, characters
            while pending and (wait or pending[0].done()):
                for story in pending.pop(0).result():
                    if hash(story) not in seen:
                        seen.add(hash(story))
                        out.write(story + "\n\n")
                        kept, characters = kept + 1, characters + len(story)

        for texts in writer.write(encoded(), shared):
            now = time.monotonic()
            started = started or now
            for opener, ids, complete in texts:
                batch.append((opener + vocabulary.decode(ids), complete))
                finished, ended = finished + 1, ended + complete
            if len(batch) >= 512:
                pending.append(pool.submit(clean_all, batch))
                batch = []
            store(wait=False)
            if now - reported > 15:
                reported = now
                rate = writer.written / max(now - started, 1e-9)
                print(
                    f"{now - started:5.0f} s  {writer.written / 1e6:6.2f} M tokens  {rate:8.0f}/s  "
                    f"{finished} texts, {ended} complete, {kept} kept, {characters / 1e6:.1f} MB",
                    flush=True,
                )
            if now - started > 60 * arguments.minutes:
                break
        pending.append(pool.submit(clean_all, batch))
        store(wait=True)
    print(f"{writer.written} tokens in {finished} texts; kept {kept} stories, {characters} characters")


if __name__ == "__main__":
    main()

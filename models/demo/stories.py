"""Have a small model write simple stories, keep the sound ones, and store them as plain text.

    python stories.py SmolLM2-135M-Instruct.Q4_1.gguf stories.txt --minutes 6
    python stories.py stories-18m.gguf stories.txt --engine --texts 256 --length 400 --minutes 34 --cleaners 1

The file holds one story after another: paragraphs end with a newline, stories are separated by a blank line.
SmolLM2 on a large GPU gives some hundred thousand stories in a few minutes; without a GPU a handful takes a minute: it
is for trying. With --engine a demo model writes, on one core.
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
from typing import TextIO

import engine_writer
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


Texts = Iterator[list[tuple[str, bool]]]
"""Texts as they end, and whether they were complete."""


class Shelf:
    """Keeps the sound stories of a stream of texts in a file, none twice; cleans them in other processes."""

    def __init__(self, out: TextIO, pool: ProcessPoolExecutor) -> None:
        self._out, self._pool = out, pool
        self._batch: list[tuple[str, bool]] = []
        self._pending: list[Future[list[str]]] = []
        self._seen: set[int] = set()
        self.finished = self.ended = self.kept = self.characters = 0

    def add(self, texts: list[tuple[str, bool]]) -> None:
        """Take texts, and store what was cleaned meanwhile."""
        self._batch += texts
        self.finished += len(texts)
        self.ended += sum(complete for _, complete in texts)
        if len(self._batch) >= 512:
            self._hand_over()
        while self._pending and self._pending[0].done():
            self._store()

    def close(self) -> None:
        """Clean and store the rest."""
        self._hand_over()
        while self._pending:
            self._store()

    def _hand_over(self) -> None:
        self._pending.append(self._pool.submit(clean_all, self._batch))
        self._batch = []

    def _store(self) -> None:
        for story in self._pending.pop(0).result():
            if hash(story) not in self._seen:
                self._seen.add(hash(story))
                self._out.write(story + "\n\n")
                self.kept, self.characters = self.kept + 1, self.characters + len(story)


def by_smollm(arguments: argparse.Namespace) -> tuple[smollm.Writer, Texts]:
    """SmolLM2-135M-Instruct, asked for a story that begins with the opener."""
    fast = torch.cuda.is_available()
    model = smollm.load(arguments.model, "cuda" if fast else "cpu", torch.bfloat16 if fast else torch.float32)
    vocabulary = model.vocabulary

    def encoded() -> Iterator[tuple[list[int], str]]:
        for ask, opener in prompts.requests(arguments.seed):
            ids = vocabulary.encode(f"{PREFIX}{ask}<|im_end|>\n<|im_start|>assistant\n{opener}")
            if len(ids) < arguments.length // 2:
                yield ids, opener

    writer = smollm.Writer(model, arguments.texts, arguments.length, smollm.Manner(), fast)
    texts = writer.write(encoded(), len(vocabulary.encode(PREFIX)))
    return writer, ([(o + vocabulary.decode(ids), complete) for o, ids, complete in part] for part in texts)


def by_engine(arguments: argparse.Namespace) -> tuple[engine_writer.EngineWriter, Texts]:
    """A model that writes stories and nothing else, and goes on from the opener: livelier than SmolLM2 for variety."""
    manner = smollm.Manner(temperature=0.9, min_p=0.05, presence=0.3, frequency=0.1, patience=140)
    writer = engine_writer.EngineWriter(arguments.model, arguments.texts, arguments.length, manner)
    return writer, writer.write(writer.encode(opener) for _, opener in prompts.requests(arguments.seed))


def main() -> None:
    """Write stories for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="GGUF file of SmolLM2-135M-Instruct; with --engine, of a demo model")
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--engine", action="store_true", help="a demo model writes, run by fiddler on one CPU core")
    parser.add_argument("--minutes", type=float, default=6, help="how long to write, loading and compiling not counted")
    parser.add_argument("--texts", type=int, default=4096, help="texts in flight")
    parser.add_argument("--length", type=int, default=352, help="positions a text may have, with its prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cleaners", type=int, default=8, help="processes that look through the texts")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    writer, texts = (by_engine if arguments.engine else by_smollm)(arguments)
    started = reported = 0.0
    with (
        ProcessPoolExecutor(arguments.cleaners, multiprocessing.get_context("spawn")) as pool,
        arguments.out.open("w", encoding="ascii") as out,
    ):
        shelf = Shelf(out, pool)
        for part in texts:
            now = time.monotonic()
            started = started or now
            shelf.add(part)
            if now - reported > 15:
                reported = now
                rate = writer.written / max(now - started, 1e-9)
                print(
                    f"{now - started:5.0f} s  {writer.written / 1e6:6.2f} M tokens  {rate:8.0f}/s  {shelf.finished} "
                    f"texts, {shelf.ended} complete, {shelf.kept} kept, {shelf.characters / 1e6:.1f} MB",
                    flush=True,
                )
            if now - started > 60 * arguments.minutes:
                break
        shelf.close()
    print(
        f"{writer.written} tokens in {shelf.finished} texts; kept {shelf.kept} stories, {shelf.characters} characters"
    )


if __name__ == "__main__":
    main()

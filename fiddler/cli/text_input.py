"""Reads texts that the user names: a prompt, a template, a schema, a grammar. Each has a limit. Knows no engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fiddler.cli.options import say
from fiddler.errors import RequestError
from fiddler.input_file import read_input, read_stdin

if TYPE_CHECKING:
    from fiddler.files.model_file import ModelFile

__all__ = ["check_prompt", "read_prompt", "read_scored", "read_utf8"]

_LARGEST_TEXT = 16 << 20  # of a template, a schema or a grammar [bytes]; large ones take a megabyte
_LARGEST_SCORED = 64 << 20  # [bytes], wikitext-2's test set 50 times; at 1000 tokens/s a day's work


def check_prompt(prompt: str | None, prompt_file: Path | None) -> None:
    """Raise BadParameter (usage error) unless just one of -p, --prompt-file and standard input gives a prompt."""
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give -p or --prompt-file, not both")
    if prompt is None and prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise typer.BadParameter("no prompt: give -p TEXT, --prompt-file FILE, or text on standard input")


def read_prompt(file: Path | None, model_file: ModelFile, context: int) -> str:
    """The prompt in a file, or else on standard input: at most what `context` tokens of the model can hold.

    The header of the model is read before, since the limit follows from its longest token. As in llama.cpp, one newline
    at the end is dropped: `echo` and editors add it. Bytes that are not UTF-8 reach the tokenizer unchanged. Raises
    RequestError where the prompt cannot be read or is too long.
    """
    from fiddler.generation.request import longest_text

    limit, too_large = longest_text(model_file.tokenizer, model_file.config, context)
    remedy = "give a text"
    if file is not None:
        data = read_input(file, limit, remedy, too_large, say)
    else:
        data = read_stdin(sys.stdin.fileno(), limit, remedy, too_large, say)
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def read_scored(file: Path) -> bytes:
    """The text to score, as llama.cpp reads it; it need not be UTF-8. Raises RequestError where it cannot be read."""
    return read_input(file, _LARGEST_SCORED, "give a file of text", "give a part of it", say).removesuffix(b"\n")


def read_utf8(file: Path, kind: str) -> str:
    """The text in a file; `kind`: what it should be. Raises RequestError where it cannot be read."""
    try:
        return read_input(file, _LARGEST_TEXT, f"give {kind}", notify=say).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{file}: is not UTF-8; give {kind}") from None

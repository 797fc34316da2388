"""Prompts in a file of JSON lines, all checked before the first one runs. Knows no model.

A line is an object: `id` (a string or a number, unique), `prompt` or `messages` (role and content each, as in OpenAI's
chat), and optional fields that override the defaults: `max_tokens`, `stop`, `ignore_eos` and the fields of `Sampling`
by name. A field that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request
from fiddler.input_file import open_regular
from fiddler.serving.json_fields import Id, Job, job_of, parse_object

__all__ = ["JobFile"]


_LONGEST_LINE = 16 << 20  # [bytes]; a context of a million tokens takes some megabytes of text


class JobFile:
    """A checked file of prompts; `ids` are those of all lines. `jobs` reads the lines again, one at a time."""

    def __init__(self, path: Path, defaults: Request) -> None:
        """Check every line. defaults: the fields that a line omits; its prompt has no meaning.

        Raises RequestError with the line number for the first invalid line, and for a file that cannot be read or
        holds no prompt.
        """
        self.path = path
        self._defaults = defaults
        self.ids: dict[Id, int] = {}  # id -> line number
        for number, job in self._lines():
            if job.id in self.ids:
                self._refuse(number, f"the id {quoted(job.id)} is that of line {self.ids[job.id]}; give each its own")
            self.ids[job.id] = number
        if not self.ids:
            raise RequestError(f'{path}: holds no prompt; give lines as {{"id": 1, "prompt": "Once upon a time"}}')

    def jobs(self, done: Collection[Id]) -> Iterator[Job]:
        """The jobs whose ids are not in `done`, in file order. Raises RequestError where the file has changed."""
        for number, job in self._lines():
            if self.ids.get(job.id) != number:
                self._refuse(number, "was changed after it was checked; run the command again")
            if job.id not in done:
                yield job

    def _lines(self) -> Iterator[tuple[int, Job]]:
        try:
            with open_regular(self.path) as lines:
                for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), b""), 1):
                    if len(line) > _LONGEST_LINE:
                        self._refuse(number, f"is longer than {_LONGEST_LINE >> 20} MiB; give shorter lines of JSON")
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if text.strip():
                        try:
                            job = job_of(parse_object(text), self._defaults)
                        except RequestError as error:
                            self._refuse(number, str(error))
                        yield number, job
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be read: {error.strerror}; give a file of JSON lines") from None

    def _refuse(self, number: int, message: str) -> NoReturn:
        raise RequestError(f"{self.path}, line {number}: {message}") from None

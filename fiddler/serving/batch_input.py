"""Prompts in a file of JSON lines: each line's fields, checked before any of them is run. Knows no model.

A line is an object: `id` (a string or a number, each once), `prompt` or `messages` (role and content each, as OpenAI's
chat), and what the defaults would say otherwise: `max_tokens`, `stop`, `ignore_eos` and the fields of `Sampling` by
their names. A field that is null counts as absent.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from fiddler.errors import RequestError, quoted
from fiddler.serving.json_fields import Defaults, Id, Job, job_of, parse_object

__all__ = ["JobFile"]


class JobFile:
    """The file; `ids` are all there are, checked. Its lines are read again as they are run, one at a time."""

    def __init__(self, path: Path, defaults: Defaults) -> None:
        """Check every line.

        Raises RequestError, with the number of the line, for the first that is not right; for a file that cannot be
        read or holds nothing.
        """
        self.path = path
        self._defaults = defaults
        self.ids: dict[Id, int] = {}  # and their lines' numbers
        for number, job in self._lines():
            if job.id in self.ids:
                self._refuse(number, f"the id {quoted(job.id)} is that of line {self.ids[job.id]}; give each its own")
            self.ids[job.id] = number
        if not self.ids:
            raise RequestError(f'{path}: holds no prompt; give lines as {{"id": 1, "prompt": "Once upon a time"}}')

    def jobs(self, done: Collection[Id]) -> Iterator[Job]:
        """Those whose ids are not `done`, in their order."""
        for number, job in self._lines():
            if self.ids.get(job.id) != number:
                self._refuse(number, "was changed after it was checked; run the command again")
            if job.id not in done:
                yield job

    def _lines(self) -> Iterator[tuple[int, Job]]:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise RequestError(f"{self.path}: is no regular file, which is read twice; give a file of JSON lines")
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
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

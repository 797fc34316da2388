"""Prompts in a file of JSON lines, all checked before the first one runs; a bad one fails alone. Knows no model.

A line is an object: `id` (a string or a number, unique), `prompt` or `messages` (role and content each, as in OpenAI's
chat), and optional fields that override the defaults: `max_tokens`, `stop`, `ignore_eos` and the fields of `Sampling`
by name. A field that is null counts as absent. OpenAI's lines of batches are read as well (`openai_batch`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request
from fiddler.input_file import open_regular
from fiddler.serving.json_fields import Id, Job, as_id, job_of, parse_object

__all__ = ["JobFile"]

_LONGEST_LINE = 16 << 20  # [bytes]; a context of a million tokens takes some megabytes of text


@dataclass(frozen=True)
class _BadLine:
    """A line that cannot run; its result is an error. `id`: None where it has none."""

    id: Id | None
    error: RequestError


class JobFile:
    """A checked file of prompts; `ids` are those of all lines. `jobs` reads the lines again, one at a time."""

    def __init__(self, path: Path, defaults: Request) -> None:
        """Check every line. defaults: the fields that a line omits; its prompt has no meaning.

        Raises RequestError for a file that cannot be read or holds no prompt that can run; then with the number of its
        first line.
        """
        self.path = path
        self._defaults = defaults
        self.ids: dict[Id, int] = {}  # id -> line number
        first_error, runnable = None, False
        for number, entry in self._lines():
            identity, job = self._identified(number, entry)
            self.ids[identity] = number
            runnable = runnable or isinstance(job, Job)
            if isinstance(job, _BadLine) and first_error is None:
                first_error = number, job.error
        if first_error is not None and not runnable:
            self._refuse(first_error[0], str(first_error[1]))
        if not self.ids:
            raise RequestError(f'{path}: holds no prompt; give lines as {{"id": 1, "prompt": "Once upon a time"}}')

    def jobs(self, done: Collection[Id]) -> Iterator[tuple[Id, Job | RequestError]]:
        """The lines whose ids are not in `done`, in file order: an id, and the job or why it cannot run.

        A line without an id of its own has the id "line N". Raises RequestError where the file has changed.
        """
        for number, entry in self._lines():
            identity, job = self._identified(number, entry)
            if self.ids.get(identity) != number:
                self._refuse(number, "was changed after it was checked; run the command again")
            if identity not in done:
                yield identity, job.error if isinstance(job, _BadLine) else job

    def _identified(self, number: int, entry: Job | _BadLine) -> tuple[Id, Job | _BadLine]:
        """The id of a line's result, and the line; an error where its id is that of an earlier line."""
        if entry.id is None:
            return f"line {number}", entry
        other = self.ids.get(entry.id, number)
        if other == number:
            return entry.id, entry
        error = RequestError(f"the id {quoted(entry.id)} is that of line {other}; give each its own")
        return f"line {number}", _BadLine(None, error)

    def _lines(self) -> Iterator[tuple[int, Job | _BadLine]]:
        try:
            with open_regular(self.path) as lines:
                for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), b""), 1):
                    if len(line) > _LONGEST_LINE:
                        self._refuse(number, f"is longer than {_LONGEST_LINE >> 20} MiB; give shorter lines of JSON")
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if text.strip():
                        yield number, self._parsed(text)
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be read: {error.strerror}; give a file of JSON lines") from None

    def _parsed(self, text: bytes) -> Job | _BadLine:
        identity = None
        try:
            line = parse_object(text)
            own = line.get("custom_id", line.get("id"))
            identity = None if own is None else as_id(own)
            return job_of(line, self._defaults)
        except RequestError as error:
            return _BadLine(identity, error)

    def _refuse(self, number: int, message: str) -> NoReturn:
        raise RequestError(f"{self.path}, line {number}: {message}") from None

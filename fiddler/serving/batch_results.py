"""Results in a file of JSON lines, which grows line by line and from which an interrupted run goes on.

Each line is one write to the end of the file, so that a process that is killed leaves whole lines, or at worst the
beginning of one, which the next run takes off. What a write gave to the system survives the process; `fsync`, at most
once a second and at the end, is for when the machine goes down. Knows no model and no prompts.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from fiddler.errors import RequestError, ResourceError
from fiddler.serving.json_fields import Id, as_id, parse_object

__all__ = ["Results"]

_BEGINNING = b'{"id": '
_SYNC = 1.0  # seconds
_ANSWER = {"id", "text", "finish_reason", "prompt_tokens", "generated_tokens"}
_FAILURE = {"id", "error"}


class Results:
    """An open file of results, of this process alone; `done` are the ids that it holds."""

    def __init__(self, path: Path, source: Path, ids: Collection[Id]) -> None:
        """Open or make `path`, for answers to `ids`, which come from the file `source`.

        The beginning of a line at the end is taken off. Raises RequestError where the file holds anything but answers
        to `ids`, is `source`, is written by another process or cannot be written.
        """
        self.path = path
        self.done: set[Id] = set()
        if path.exists() and source.exists() and path.samefile(source):
            raise RequestError(f"{path}: is the file of prompts; give another file for the results")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror}; give another file") from None
        try:
            self._lock()
            self._read(ids)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def add(self, identity: Id, **answer: Any) -> None:
        """Append a line. Raises ResourceError where the disk is full; then the file ends where it did before."""
        line = (json.dumps({"id": identity, **answer}, ensure_ascii=False) + "\n").encode()
        end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                written += os.write(self._file, line[written:])  # says why
            short = None if written == len(line) else "only a part was written"
        except OSError as error:
            short = error.strerror
        if short is not None:
            os.ftruncate(self._file, end)
            raise ResourceError(f"{self.path}: cannot be written: {short}; make room, then run the command again")
        self.done.add(identity)
        if time.monotonic() >= self._synced + _SYNC:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise RequestError(f"{self.path}: is no regular file, from which a run could go on; give another")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{self.path}: another process is writing it; wait for that, or give another file"
            ) from None
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be locked: {error.strerror}; give a file elsewhere") from None

    def _read(self, ids: Collection[Id]) -> None:
        """Note what is there, and take off what is not whole."""
        whole = 0
        with os.fdopen(os.dup(self._file), "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                        self._refuse(number, "is not the beginning of a result")
                    os.ftruncate(self._file, whole)
                    return
                whole += len(line)
                try:
                    found = parse_object(line)
                    identity = as_id(found.get("id"))
                except RequestError as error:
                    self._refuse(number, str(error).partition(";")[0])
                if not (found.keys() >= _ANSWER or found.keys() >= _FAILURE):
                    self._refuse(number, "is no result")
                if identity not in ids:
                    self._refuse(number, f"answers {identity!r:.60}, which is not among the prompts")
                if identity in self.done:
                    self._refuse(number, f"answers {identity!r:.60} again")
                self.done.add(identity)

    def _refuse(self, number: int, message: str) -> NoReturn:
        raise RequestError(
            f"{self.path}, line {number}: {message}: not what these prompts gave; give another file for the results"
        ) from None

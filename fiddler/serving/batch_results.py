"""Results in a file of JSON lines, appended one by one, from which an interrupted run resumes.

Each line is one write to the end of the file: a killed process leaves whole lines, or at worst one partial line at the
end, which the next run removes. Written lines survive the process; `fsync`, at most once a second and at the end,
guards against a crash of the machine. Knows no model and no prompts.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import stat
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from fiddler.errors import RequestError, ResourceError
from fiddler.files.atomic_file import OutputFile
from fiddler.files.destination import find_destination
from fiddler.serving.json_fields import Id, as_id, parse_object

__all__ = ["Results"]

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_LINE_START = b'{"id": '
_LONGEST_LINE = 256 << 20  # [bytes]; 32,768 tokens with 80 log-probabilities each
_SYNC_INTERVAL = 1.0  # [s]
_ANSWER_KEYS = {"id", "text", "finish_reason", "prompt_tokens", "generated_tokens"}
_ERROR_KEYS = {"id", "error"}


class Results:
    """An open file of results, locked by this process if it is a regular one; `done` are the ids that have one."""

    def __init__(self, path: Path, source: Path, ids: Collection[Id]) -> None:
        """Open or create `path`, for results of `ids`, which come from the file `source`.

        Removes a partial line at the end. A pipe or a device, as /dev/null, is written straight through: it has no
        results to resume from. Raises RequestError where the file holds anything but results of `ids`, is
        `source`, is being written by another process or cannot be written.
        """
        self.path = path
        self.done: set[Id] = set()
        self._stream: OutputFile | None = None
        to = find_destination(path)
        if to.is_stream and not stat.S_ISREG(to.mode or 0):
            self._file = to.open_stream()
            self._stream = OutputFile(path, self._file)
            return
        if path.exists() and source.exists() and path.samefile(source):
            raise RequestError(f"{path}: is the file of prompts; give another file for the results")
        try:
            self._file = os.open(path, _FLAGS, 0o666)
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
            self._sync()
        finally:
            os.close(self._file)

    def add(self, identity: Id, **answer: Any) -> None:
        """Append a result as one line. Raises ResourceError where the disk is full, and leaves the file unchanged."""
        line = (json.dumps({"id": identity, **answer}, ensure_ascii=False) + "\n").encode()
        if self._stream is not None:
            self._stream.write(line)
            self.done.add(identity)
        else:
            self._append(identity, line)
        if self._stream is None and time.monotonic() >= self._synced + _SYNC_INTERVAL:
            self._sync()

    def _append(self, identity: Id, line: bytes) -> None:
        """Write a line; `done` has its id just if the file has it, when Ctrl-C comes in between, too."""
        end = os.fstat(self._file).st_size
        try:
            self.done.add(identity)
            self._write(line, end)
        except BaseException:
            if os.fstat(self._file).st_size < end + len(line):
                self.done.discard(identity)
            raise

    def _write(self, line: bytes, end: int) -> None:
        try:
            written = os.write(self._file, line)
            if written < len(line):
                written += os.write(self._file, line[written:])  # raises with the reason
            failure = None if written == len(line) else "only a part was written"
        except OSError as error:
            failure = error.strerror
        if failure is not None:
            with contextlib.suppress(OSError):  # else the next run removes the partial line
                os.ftruncate(self._file, end)
            raise ResourceError(f"{self.path}: cannot be written: {failure}; make room, then run the command again")

    def _sync(self) -> None:
        if self._stream is not None:
            return
        try:
            os.fsync(self._file)
        except OSError as error:  # a disk that took the bytes and has no room for them, as over a network
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror}; make room, then run the command again"
            ) from error
        self._synced = time.monotonic()

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise RequestError(f"{self.path}: is no regular file, and no pipe or device; give another")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{self.path}: another process is writing it; wait for that, or give another file"
            ) from None
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be locked: {error.strerror}; give a file elsewhere") from None

    def _read(self, ids: Collection[Id]) -> None:
        """Collect the ids in the file, and remove a partial line at the end."""
        complete_bytes = 0
        with os.fdopen(os.dup(self._file), "rb") as lines:
            for number in itertools.count(1):
                if lines.peek(1)[:1] not in (b"", b"{"):  # read no more of what is another file
                    self._refuse(number, "is not the beginning of a result")
                line = lines.readline(_LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > _LONGEST_LINE:
                    self._refuse(number, f"is longer than {_LONGEST_LINE >> 20} MiB")
                if not line.endswith(b"\n"):
                    if not (line.startswith(_LINE_START) or _LINE_START.startswith(line)):
                        self._refuse(number, "is not the beginning of a result")
                    os.ftruncate(self._file, complete_bytes)
                    return
                complete_bytes += len(line)
                try:
                    result = parse_object(line)
                    identity = as_id(result.get("id"))
                except RequestError as error:
                    self._refuse(number, str(error).partition(";")[0])
                if not (result.keys() >= _ANSWER_KEYS or result.keys() >= _ERROR_KEYS):
                    self._refuse(number, "is no result")
                if identity not in ids:
                    self._refuse(number, f"answers {identity!r:.60}, which is not among the prompts")
                if identity in self.done:
                    self._refuse(number, f"answers {identity!r:.60} again")
                self.done.add(identity)

    def _refuse(self, number: int, message: str) -> NoReturn:
        raise RequestError(
            f"{self.path}, line {number}: {message}: not a result of these prompts; give another file for the results"
        ) from None

"""Starts, queries and ends the process that computes token masks. Knows tokens and the names of guides, no grammar."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from itertools import count
from threading import RLock
from typing import Any

from fiddler.errors import RequestError, ResourceError
from fiddler.sampling.grammar_compiler import one_line
from fiddler.text.python_process import command, environment
from fiddler.text.tokenizer import Tokenizer

__all__ = ["MaskProcess"]

_PATIENCE = 60.0  # wall time of one answer [s]: the machine may be busy


class MaskProcess:
    """Masks of guides, which are numbers. The process starts at first use, and again after a grammar has ended it.

    A guide that the process does not hold, as after such an end, is computed from its source and all of its tokens.
    Several threads may use it: their questions come in turn.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = 2.0, memory: int = 1 << 30) -> None:
        """seconds: limit of a mask's CPU time. memory: limit for all guides, beyond that at the start [bytes]."""
        self._seconds, self._memory = seconds, memory
        self._tokens = _Tokens(tokenizer)
        self._numbers, self._lock = count(), RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._held: dict[int, int] = {}  # guide -> how many of its tokens the process has
        self._dropped: list[int] = []

    def new(self) -> int:
        """A guide that the process does not hold yet."""
        return next(self._numbers)

    def copy(self, guide: int, copied: int) -> None:
        """Give the guide `copied` the state of another."""
        with self._lock:
            if guide in self._held and self._process is not None:
                with contextlib.suppress(BrokenPipeError):  # its end shows at the next mask
                    _write(self._process, ["copy", copied, guide])
                self._held[copied] = self._held[guide]

    def drop(self, guide: int) -> None:
        """Forget a guide. May be called at any time, as by the garbage collector."""
        self._dropped.append(guide)

    def mask(self, guide: int, source: str, tokens: Sequence[int]) -> bytes:
        """A bit a token, lowest first: which ones may follow `tokens` in the language `source`.

        Raises RequestError with the library's reason where there is none, and where it takes too much time or memory;
        ResourceError where no process can be started.
        """
        with self._lock:
            answer = self._answer(guide, source, tokens)
            if answer is None:  # short of memory, maybe through the others, or killed
                self.close()
                answer = self._answer(guide, source, tokens)
            if answer is None:
                self.close()
        if answer is None:
            raise RequestError(f"it takes more than {self._memory >> 20} MiB of memory; give a simpler one")
        if answer[:1] == b"e":
            raise RequestError(one_line(answer[1:].decode("utf-8", "replace")))
        return answer[1:]

    def close(self) -> None:
        """End the process; a later `mask` starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None
        self._held.clear()
        self._dropped.clear()

    def _answer(self, guide: int, source: str, tokens: Sequence[int]) -> bytes | None:
        """The process's answer; None where it ended for want of memory."""
        process = self._running()
        held = self._held.get(guide)
        self._held[guide] = len(tokens)
        try:
            if self._dropped:
                dropped, self._dropped = self._dropped, []
                for each in dropped:
                    self._held.pop(each, None)
                _write(process, ["drop", dropped])
            _write(process, ["mask", guide, tokens[held or 0 :], source if held is None else None])
            return self._read(process)
        except (BrokenPipeError, EOFError):
            self._check_death(process)
            return None
        except BaseException:
            self.close()  # or the next request would read this one's answer
            raise

    def _read(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next answer, after the process's questions. Raises EOFError where none comes."""
        deadline = time.monotonic() + _PATIENCE
        while (answer := _read(process, deadline))[:1] == b"q":
            _write(process, self._tokens.ids(answer[1:]))
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        try:
            process = subprocess.Popen(
                command("fiddler.sampling.mask_worker", self._seconds, self._memory),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,  # Ctrl-C must not reach it
            )
        except OSError as error:
            raise ResourceError(f"cannot start {sys.executable} to follow a grammar: {error.strerror}") from None
        self._process, self._finalizer = process, weakref.finalize(self, _stop, process)
        try:
            _write(process, self._tokens.described())
            self._read(process)
        except (BrokenPipeError, EOFError):
            self.close()
            raise ResourceError("the process that follows a grammar does not start") from None
        except BaseException:
            self.close()
            raise
        return process

    def _check_death(self, process: subprocess.Popen[bytes]) -> None:
        """Reap the process; raise unless it ended for want of memory."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # still running if the deadline passed
            process.wait(timeout=1)
        code = process.poll()
        if code is None or code == -signal.SIGPROF or code > 0:
            self.close()
        if code is None:
            raise RequestError(f"its next token takes more than {_PATIENCE:g} s; give a simpler one")
        if code == -signal.SIGPROF:
            raise RequestError(
                f"it takes more than {self._seconds:g} s of computing and 50 ms a token; give a simpler one"
            )
        if code > 0:
            raise ResourceError(f"the process that follows a grammar ended with exit code {code}")


class _Tokens:
    """A tokenizer's tokens as the library takes them.

    A token without text begins with the byte 0xFF, which marks it as special: no grammar reaches it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, pieces = tokenizer, tokenizer.pieces()
        self._tokens = [piece or b"\xff[%d]" % token for token, piece in enumerate(pieces)]
        self._byte_ids = tokenizer.byte_ids

    def described(self) -> list[Any]:
        """The first message to the process."""
        tokens = [token.decode("latin-1") for token in self._tokens]
        return [tokens, self._tokenizer.bos_id, self._tokenizer.eos_id, sorted(self._tokenizer.end_ids)]

    def ids(self, text: bytes) -> list[int]:
        """Ids of a text that the grammar forces, as the model would write it: without a space before it.

        Where the tokenizer changes a text, as SentencePiece does a U+2581, the ids are those of its bytes.
        """
        ids = self._tokenizer.encode(text, continuing=True)
        if b"".join([self._tokens[token] for token in ids]) == text:
            return ids
        return [self._byte_ids[byte] for byte in text if byte in self._byte_ids]


def _write(process: subprocess.Popen[bytes], message: list[Any]) -> None:
    assert process.stdin is not None
    data = json.dumps(message).encode()
    process.stdin.write(struct.pack("<I", len(data)) + data)
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """A message of the process. Raises EOFError where it ended or the deadline passed."""
    assert process.stdout is not None
    pipe, data, needed = process.stdout.fileno(), b"", 4
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(data) < needed:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):  # [ms]
            raise EOFError
        part = os.read(pipe, 1 << 16)
        if not part:
            raise EOFError
        data += part
        if len(data) >= 4:
            needed = 4 + struct.unpack_from("<I", data)[0]
    return data[4:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, kill the process and reap it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # the process did not read its last request
                pipe.close()
    process.kill()
    process.wait()

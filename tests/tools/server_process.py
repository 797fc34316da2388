"""`fiddler serve` as a process of its own on a free port: for tests, and for tools that load it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["KEY", "ServerProcess"]

KEY = "sk-the-secret-key"
"""Of servers that tests start with one."""

PATIENCE = 300  # [s]


class ServerProcess:
    """A running server: `url` is its address, `pid` its process. Ends with the `with` block."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        """arguments: behind `fiddler serve --port 0`. Raises RuntimeError with its stderr where it does not start."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fiddler", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FIDDLER_DEVICE": "cpu", **(env or {})},
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = re.search(r"http://\S+", line)
        if match is None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            raise RuntimeError(f"no server: {line!r} {self.errors!r}")
        self.url, self.line = match[0], line

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop(signal.SIGKILL)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return "".join(self._errors)

    def stop(self, number: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send a signal and wait for the end: the exit code."""
        self._process.send_signal(number)
        code = self._process.wait(timeout)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def memory(self) -> dict[str, int]:
        """Resident memory that is no file's [bytes], threads and open descriptors of the process."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return {
            "anonymous": int(status["RssAnon"].split()[0]) << 10,
            "threads": int(status["Threads"]),
            "descriptors": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
        }

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._errors.extend(lines)

"""The errors a user can cause: one base class and its few kinds. Standard library only; every room may import it.

`cli/` turns any of these into one line and exit code 1. A message names the offending value and the remedy.
"""

import os
from pathlib import Path

__all__ = [
    "CheckpointError",
    "FiddlerError",
    "FileFormatError",
    "RequestError",
    "ResourceError",
    "flag_of",
    "path_of",
    "quoted",
]

_LONGEST_PATH = 4096  # Linux's limit [bytes]


class FiddlerError(Exception):
    """Base of every error a user can cause. Its message is one printable line, whatever a name in it holds."""

    def __init__(self, *values: object) -> None:
        super().__init__(*(_printable(value) if isinstance(value, str) else value for value in values))


class CheckpointError(FiddlerError):
    """A Hugging Face folder that is incomplete, inconsistent or not supported."""


class FileFormatError(FiddlerError):
    """A model file that is malformed, truncated or cannot be run."""


class RequestError(FiddlerError):
    """A request that makes no sense: an option out of range, a prompt longer than the context."""


class ResourceError(FiddlerError):
    """Too little memory, disk or hardware for the request."""


def quoted(value: object, max_length: int = 60) -> str:
    """An untrusted value, for a message: one printable line of at most `max_length` characters."""
    if hasattr(value, "size"):
        text = f"an array of {value.size}"
    elif isinstance(value, (list, tuple, dict)) and len(value) > max_length:
        text = f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"a number of {value.bit_length()} bits"  # Python refuses to print the largest
    else:
        try:
            text = ascii(value[: max_length + 1] if isinstance(value, (str, bytes)) else value)
        except Exception:  # noqa: BLE001  # lists in lists too deep for Python, or an object's own error
            text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def path_of(name: str, value: object) -> Path:
    """`value` as a path. Raises RequestError where it is none, or longer than any, or no name of a file."""
    if not isinstance(value, str | Path) or len(str(value)) > _LONGEST_PATH or not _can_be_a_name(str(value)):
        raise RequestError(f"{name} is {quoted(value)}; give the path of a file")
    return Path(value)


def flag_of(name: str, value: object) -> bool:
    """`value`, which is True or False. Raises RequestError for anything else."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {quoted(value)}; give True or False")
    return value


def _can_be_a_name(path: str) -> bool:
    """Whether the operating system takes it: no null character, nor a surrogate that stands for no byte."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _printable(text: str) -> str:
    r"""`text` with everything but printable characters written out, as `\x1b` or `\n`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

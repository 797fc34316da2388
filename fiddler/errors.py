"""The errors a user can cause: one base class and its few kinds. Standard library only; every room may import it.

`cli/` turns any of these into one line and exit code 1. A message names the offending value and the remedy.
"""

from pathlib import Path

__all__ = ["CheckpointError", "FiddlerError", "FileFormatError", "RequestError", "ResourceError", "path_of", "quoted"]

_LONGEST_PATH = 4096  # Linux's limit [bytes]


class FiddlerError(Exception):
    """Base of every error a user can cause."""


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
        text = ascii(value[: max_length + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def path_of(name: str, value: object) -> Path:
    """`value` as a path. Raises RequestError where it is none, or longer than any."""
    if not isinstance(value, str | Path) or len(str(value)) > _LONGEST_PATH:
        raise RequestError(f"{name} is {quoted(value)}; give the path of a file")
    return Path(value)

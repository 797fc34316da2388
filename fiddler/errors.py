"""The errors a user can cause: one base class and its few kinds. Standard library only; every room may import it.

`cli/` turns any of these into one line and exit code 1. A message names the offending value and the remedy.
"""

__all__ = ["CheckpointError", "FiddlerError", "FileFormatError", "RequestError", "ResourceError", "quoted"]


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
    elif isinstance(value, (list, dict)) and len(value) > max_length:
        text = f"a {type(value).__name__} of {len(value)}"
    else:
        text = ascii(value)
    return text if len(text) <= max_length else text[: max_length - 3] + "..."

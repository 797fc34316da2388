"""The errors a user can cause: one base class and its few kinds. Standard library only; every room may import it.

`cli.py` turns any of these into one line and exit code 1. A message names the offending value and the remedy.
"""

__all__ = ["CheckpointError", "FiddlerError", "FileFormatError", "RequestError", "ResourceError"]


class FiddlerError(Exception):
    """Base of every error a user can cause."""


class CheckpointError(FiddlerError):
    """A Hugging Face folder that is incomplete, inconsistent or not supported."""


class FileFormatError(FiddlerError):
    """A model file that is malformed, truncated or holds what cannot be run."""


class RequestError(FiddlerError):
    """A request that makes no sense: an option out of range, a prompt longer than the context."""


class ResourceError(FiddlerError):
    """Too little memory, disk or hardware for what was asked."""

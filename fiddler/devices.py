"""Whether there is a GPU to compute on. Knows torch and what a user asked for; no models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fiddler.errors import RequestError, ResourceError

__all__ = ["wants_gpu"]


def wants_gpu(device: str, gpu_memory: str | None, notify: Callable[[str], None]) -> bool:
    """Whether to use a GPU, and a line that says why not where one might have been expected.

    Raises ResourceError where one was asked for and there is none that starts.
    """
    if device == "cpu":
        if gpu_memory is not None:
            raise RequestError(f"--gpu-memory {gpu_memory} with --device cpu: leave out one of them")
        return False
    try:
        built = torch.version.cuda is not None
        if built:
            torch.cuda.init()
        reason = None if built else f"this torch {torch.__version__} is built without CUDA"
    except (RuntimeError, AssertionError, OSError) as error:  # what torch raises where a driver is missing or broken
        reason = "the GPU does not start: " + (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        return True
    if device == "cuda" or gpu_memory is not None:
        raise ResourceError(f"{reason}; use --device cpu, without --gpu-memory")
    notify(f"computing on the CPU: {reason}")
    return False

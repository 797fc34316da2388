"""Whether there is a GPU to compute on. Knows torch and what a user asked for; no models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fiddler.errors import RequestError, ResourceError

__all__ = ["wants_gpu"]


def wants_gpu(device: str, gpu_memory: str | None, notify: Callable[[str], None]) -> tuple[bool, str]:
    """Whether to use a GPU, and, in a line, why not.

    Where torch is built for GPUs and there is none, `notify` is told; a torch for CPUs was somebody's choice.
    Raises ResourceError where a GPU was asked for and there is none that starts.
    """
    if device == "cpu":
        if gpu_memory is not None:
            raise RequestError(
                f"--gpu-memory {gpu_memory} with --device cpu, or FIDDLER_DEVICE=cpu: leave out one of them"
            )
        return False, "CPU, as asked"
    built = torch.version.cuda is not None
    reason = None if built else f"this torch {torch.__version__} is built without CUDA"
    if built:
        try:
            torch.cuda.init()
        except (
            RuntimeError,
            AssertionError,
            OSError,
        ) as error:  # what torch raises where a driver is missing or broken
            reason = "the GPU does not start: " + (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        return True, ""
    if device == "cuda" or gpu_memory is not None:
        raise ResourceError(f"{reason}; use --device cpu, without --gpu-memory")
    if built:
        notify(f"computing on the CPU: {reason}")
    return False, f"CPU: {reason}"

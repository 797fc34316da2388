"""Decides whether to compute on a GPU. Knows torch and the user's options; no models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fiddler.errors import ResourceError

__all__ = ["wants_gpu"]


def wants_gpu(device: str, gpu_memory: int | None, notify: Callable[[str], None]) -> tuple[bool, str]:
    """Whether to use a GPU; if not, the reason in one line.

    Calls `notify` where torch is built with CUDA and no GPU starts; a torch without CUDA is somebody's choice.
    Raises ResourceError where the user requests a GPU, or some of its memory, and none starts.
    """
    if device == "cpu":
        return False, "CPU, as asked"
    with_cuda = torch.version.cuda is not None
    reason = None if with_cuda else f"this torch {torch.__version__} is built without CUDA"
    if with_cuda:
        try:
            torch.cuda.init()
        except (
            RuntimeError,
            AssertionError,
            OSError,
        ) as error:  # from torch, where a driver is missing or broken
            reason = "the GPU does not start: " + (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        return True, ""
    if device == "cuda" or gpu_memory is not None:
        raise ResourceError(f"{reason}; use --device cpu, without --gpu-memory")
    if with_cuda:
        notify(f"computing on the CPU: {reason}")
    return False, f"CPU: {reason}"

"""Decides whether to compute on a GPU. Knows torch and the user's options; no models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fiddler.errors import ResourceError

__all__ = ["has_nvidia_gpu", "wants_gpu"]

_NVIDIA = "0x10de"  # vendor of PCI devices, https://pci-ids.ucw.cz
_DISPLAY = "0x03"  # class of PCI devices: display controllers


def wants_gpu(device: str, gpu_memory: int | None, notify: Callable[[str], None]) -> tuple[bool, str]:
    """Whether to use a GPU; if not, the reason in one line.

    Calls `notify` where torch is built with CUDA and a GPU that is there does not start. Without a GPU, or with a torch
    without CUDA, the CPU is what the user expects.
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
    if with_cuda and has_nvidia_gpu():
        notify(f"computing on the CPU: {reason}")
    return False, f"CPU: {reason}"


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the machine has an NVIDIA GPU, by its device file or on the PCI bus; needs no driver.

    root: of the file system.
    """
    if (root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists():  # a driver; one inside WSL
        return True
    for device in root.glob("sys/bus/pci/devices/*"):
        with suppress(OSError):
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
            if vendor == _NVIDIA and kind.startswith(_DISPLAY):
                return True
    return False

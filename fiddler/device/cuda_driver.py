"""Calls to NVIDIA's driver that torch does not offer: pinning mapped memory, copies from it, stream waits, memory used.

Knows addresses and bytes; not tensors or models. Calls the driver's own libraries, not the CUDA runtime: torch brings
its own version of that, in its own place. See the CUDA Driver API, "Memory Management", and NVML.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache

from fiddler.device.c_functions import Copy2D
from fiddler.errors import ResourceError

__all__ = [
    "c_addresses",
    "check_copy",
    "copy_rows_to_device",
    "copy_to_device",
    "copy_to_host",
    "ends_long_kernels",
    "pin",
    "start",
    "unpin",
    "used_at_first",
    "wait_for_value",
    "write_value",
]

_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY: the driver pins a read-only, shared mapping only with this flag
_HOST, _DEVICE = 1, 2  # CUmemorytype
_KERNEL_TIME_LIMIT = 17  # CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_v2_t: unlike the first version, `used` excludes the driver's own reservation."""

    _fields_ = [
        ("version", c_uint),
        ("total", c_uint64),
        ("reserved", c_uint64),
        ("free", c_uint64),
        ("used", c_uint64),
    ]


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ResourceError(f"NVIDIA's driver library cannot be loaded: {error}; use --device cpu") from None
    library.cuMemHostRegister_v2.argtypes = [c_void_p, c_size_t, c_uint]
    library.cuMemHostUnregister.argtypes = [c_void_p]
    library.cuMemcpyHtoDAsync_v2.argtypes = [c_uint64, c_void_p, c_size_t, c_void_p]
    library.cuMemcpyDtoHAsync_v2.argtypes = [c_void_p, c_uint64, c_size_t, c_void_p]
    library.cuMemcpy2DAsync_v2.argtypes = [c_void_p, c_void_p]
    if hasattr(library, "cuStreamWaitValue32_v2"):
        library.cuStreamWaitValue32_v2.argtypes = [c_void_p, c_uint64, c_uint, c_uint]
        library.cuStreamWriteValue32_v2.argtypes = [c_void_p, c_uint64, c_uint, c_uint]
    return library


def start() -> None:
    """Make the first GPU that this process may use current in the calling thread. Raises ResourceError.

    Uses the GPU's primary context, as torch will.
    """
    library, device, context = _driver(), c_int(), c_void_p()
    if (
        library.cuInit(0)
        or library.cuDeviceGet(byref(device), 0)
        or library.cuDevicePrimaryCtxRetain(byref(context), device)
        or library.cuCtxSetCurrent(context)
    ):
        raise ResourceError("the GPU does not start")


def ends_long_kernels(device: int) -> bool:
    """Whether the driver ends kernels of a GPU that take seconds, as where it drives a display. device: from 0 on."""
    limited = c_int()
    if _driver().cuDeviceGetAttribute(byref(limited), _KERNEL_TIME_LIMIT, device):
        return True
    return bool(limited.value)


def pin(address: int, nbytes: int) -> bool:
    """Pin mapped memory, so that the device's copy engine reads it in place; False where the driver refuses."""
    return int(_driver().cuMemHostRegister_v2(address, nbytes, _READ_ONLY)) == 0


def unpin(address: int) -> None:
    """Undo `pin`."""
    _driver().cuMemHostUnregister(address)


def copy_to_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """Start a copy of host memory to the device; asynchronous where the memory is pinned."""
    _check(_driver().cuMemcpyHtoDAsync_v2(target, source, nbytes, stream), "a copy to the GPU")


def c_addresses() -> tuple[int, int, int]:
    """Addresses of the driver's functions for compiled code, as in `CFunctions`; their results: see `check_copy`."""
    driver = _driver()
    functions = driver.cuMemcpyHtoDAsync_v2, driver.cuMemcpy2DAsync_v2, driver.cuStreamWriteValue32_v2
    copy, copy_rows, write = (ctypes.cast(function, c_void_p).value or 0 for function in functions)
    return copy, copy_rows, write


def check_copy(result: int) -> None:
    """Raise ResourceError unless a copy's result is 0."""
    _check(result, "a copy to the GPU")


def copy_to_host(target: int, source: int, nbytes: int, stream: int) -> None:
    """Start a copy of device memory to pinned memory of the host."""
    _check(_driver().cuMemcpyDtoHAsync_v2(target, source, nbytes, stream), "a copy from the GPU")


def copy_rows_to_device(target: int, source: int, row_bytes: int, rows: int, pitch: int, stream: int) -> None:
    """Start a copy of `rows` rows of `row_bytes` bytes, `pitch` bytes apart in host memory, packed on the device."""
    copy = Copy2D(
        srcMemoryType=_HOST,
        srcHost=source,
        srcPitch=pitch,
        dstMemoryType=_DEVICE,
        dstDevice=target,
        dstPitch=row_bytes,
        WidthInBytes=row_bytes,
        Height=rows,
    )
    _check(_driver().cuMemcpy2DAsync_v2(byref(copy), stream), "a copy to the GPU")


def wait_for_value(stream: int, address: int, value: int) -> bool:
    """Make the stream wait until the uint32 at `address`, in pinned memory, has reached `value`.

    Compares modulo 2**32, by CU_STREAM_WAIT_VALUE_GEQ, which is 0. Returns False where the driver cannot wait.
    """
    library = _driver()
    if not hasattr(library, "cuStreamWaitValue32_v2"):
        return False
    return int(library.cuStreamWaitValue32_v2(stream, address, value, 0)) == 0


def write_value(stream: int, address: int, value: int) -> None:
    """Make the stream write a uint32 to `address`, in pinned memory, after all its work so far.

    For drivers whose `wait_for_value` is True.
    """
    _check(_driver().cuStreamWriteValue32_v2(stream, address, value, 0), "a signal of the GPU")


@cache
def used_at_first() -> dict[int, int] | None:
    """Memory [bytes] that all programs use on each GPU, by PCI bus, at the first call; None without (a new) NVML.

    Call it before this process uses the GPU. Unlike torch's figure it needs no context on the GPU: a context itself
    takes hundreds of megabytes.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if not hasattr(library, "nvmlDeviceGetMemoryInfo_v2") or library.nvmlInit_v2() != 0:
        return None
    used_by_bus: dict[int, int] = {}
    try:
        count = c_uint()
        library.nvmlDeviceGetCount_v2(byref(count))
        for index in range(count.value):
            handle, memory, pci = c_void_p(), _NvmlMemory(version=2 << 24 | ctypes.sizeof(_NvmlMemory)), (c_uint * 64)()
            if library.nvmlDeviceGetHandleByIndex_v2(index, byref(handle)):
                continue
            # nvmlPciInfo_t (version 3): 16 bytes of text, then domain, bus, device
            if library.nvmlDeviceGetPciInfo_v3(handle, byref(pci)) or library.nvmlDeviceGetMemoryInfo_v2(
                handle, byref(memory)
            ):
                continue
            used_by_bus[int(pci[5])] = int(memory.used)
    finally:
        library.nvmlShutdown()
    return used_by_bus


def _check(result: int, action: str) -> None:
    if result != 0:
        raise ResourceError(f"{action} failed: CUDA driver error {result}; use --device cpu, or less --gpu-memory")

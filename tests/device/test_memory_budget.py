"""Sizes as people write them, and what memory the system tells of."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from fiddler.device.memory_budget import at_least, parse_size
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.errors import RequestError, ResourceError
from fiddler.host_memory import available_memory, cached_bytes, in_memory, populate


@pytest.mark.parametrize(
    "text,nbytes",
    [("24GiB", 24 << 30), ("24gib", 24 << 30), ("1.5 GiB", 3 << 29), ("24G", 24 * 10**9), ("8000MB", 8 * 10**9),
     ("1073741824", 1 << 30), ("512KiB", 1 << 19), ("1T", 10**12)],
)  # fmt: skip
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_what_a_message_says_suffices():
    for nbytes in (1, 5 << 30, (5 << 30) + 1, 5_529_000_000):
        assert nbytes <= parse_size(at_least(nbytes)) < nbytes * 1.01 + (1 << 24)


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-1GiB", "GiB", "1PiB", "1e9", "24 apples", "٣GiB", "1" * 50])
def test_what_is_no_size(text):
    with pytest.raises(RequestError, match="--gpu-memory"):
        parse_size(text)


def test_pages_that_are_in_memory_are_counted(tmp_path):
    path, pages = tmp_path / "file", 300
    path.write_bytes(bytes(pages * mmap.PAGESIZE))
    with path.open("rb") as file:
        view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    assert cached_bytes(view.ctypes.data, view.nbytes) == view.nbytes  # it was just written
    untouched = np.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), np.uint8)
    assert cached_bytes(untouched.ctypes.data, untouched.nbytes) == 0
    if populate(view.ctypes.data, view.nbytes) == 0:
        assert populate(untouched.ctypes.data, untouched.nbytes) == 0
        assert cached_bytes(untouched.ctypes.data, untouched.nbytes) == untouched.nbytes
    assert 0 < available_memory() < 1 << 50


def test_files_that_live_in_memory():
    assert in_memory(None)
    assert not in_memory(Path("/proc/self/mounts"))
    if Path("/dev/shm").is_dir():
        assert in_memory(Path("/dev/shm/any.gguf"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_driver_registering_says_why():
    memory = mmap.mmap(-1, 1 << 22)
    pinned = PinnedMapping([(np.frombuffer(memory, np.uint8).ctypes.data, 1 << 22)], None, memory)
    pinned.counted()
    with pytest.raises(ResourceError, match=r"driver library|GPU does not start"):
        pinned.wait()


def test_more_than_the_memory_is_not_registered():
    huge = [(mmap.PAGESIZE, 1 << 50)]
    with pytest.raises(ResourceError, match=r"1048576.00 GiB exceed the memory"):
        PinnedMapping(huge, Path("/proc/self/mounts"), None).wait()


def test_whatever_the_driver_raises_is_told(monkeypatch):
    def fail():
        raise AttributeError("no such symbol")

    monkeypatch.setattr("fiddler.device.pinned_mapping.cuda_driver.used_at_first", fail)
    with pytest.raises(ResourceError, match="no such symbol"):
        PinnedMapping([(mmap.PAGESIZE, mmap.PAGESIZE)], None, None).wait()

"""Memory sizes in messages, the memory that the system reports, and errors of pinning."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from fiddler.device.memory_budget import at_least
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.errors import ResourceError
from fiddler.host_memory import available_memory, cached_bytes, in_memory, populate
from fiddler.load_options import parse_size


def test_a_size_named_in_a_message_suffices_and_is_close():
    for nbytes in (1, 5 << 30, (5 << 30) + 1, 5_529_000_000):
        assert nbytes <= parse_size(at_least(nbytes)) < nbytes * 1.01 + (1 << 24)


def test_cached_bytes_are_the_pages_in_memory(tmp_path):
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


def test_files_of_an_in_memory_file_system_are_recognised():
    assert in_memory(None)
    assert not in_memory(Path("/proc/self/mounts"))
    if Path("/dev/shm").is_dir():
        assert in_memory(Path("/dev/shm/any.gguf"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_pinning_without_a_driver_raises_the_reason():
    memory = mmap.mmap(-1, 1 << 22)
    pinned = PinnedMapping([(np.frombuffer(memory, np.uint8).ctypes.data, 1 << 22)], None, memory)
    pinned.counted()
    with pytest.raises(ResourceError, match=r"driver library|GPU does not start"):
        pinned.wait()


def test_a_mapping_larger_than_memory_is_not_pinned():
    huge = [(mmap.PAGESIZE, 1 << 50)]
    with pytest.raises(ResourceError, match=r"1048576.00 GiB exceed the memory"):
        PinnedMapping(huge, Path("/proc/self/mounts"), None).wait()


def test_any_error_of_the_driver_is_named(monkeypatch):
    def fail():
        raise AttributeError("no such symbol")

    monkeypatch.setattr("fiddler.device.pinned_mapping.cuda_driver.used_at_first", fail)
    with pytest.raises(ResourceError, match="no such symbol"):
        PinnedMapping([(mmap.PAGESIZE, mmap.PAGESIZE)], None, None).wait()

"""Whether to use a GPU: what the machine has, what torch can start, and what the user asked for."""

import pytest
import torch

from fiddler.device import detection
from fiddler.errors import ResourceError


@pytest.mark.parametrize(
    "error", [RuntimeError("no driver\nsee www"), AssertionError("no driver"), OSError("no driver")]
)
@pytest.mark.parametrize("there", [True, False])
def test_where_the_gpu_does_not_start_the_cpu_computes_and_says_so_if_there_is_one(monkeypatch, error, there):
    def init():
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(detection, "has_nvidia_gpu", lambda: there)
    warnings = []
    reason = "the GPU does not start: no driver"
    assert detection.wants_gpu("auto", None, warnings.append) == (False, f"CPU: {reason}")
    assert warnings == ([f"computing on the CPU: {reason}"] if there else [])
    with pytest.raises(ResourceError, match=f"^{reason}; use --device cpu"):
        detection.wants_gpu("cuda", None, warnings.append)


@pytest.mark.parametrize(
    ("files", "there"),
    [
        ({}, False),
        ({"dev/null": ""}, False),
        ({"dev/nvidiactl": ""}, True),
        ({"dev/dxg": ""}, True),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x030200\n"}, True),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x040300\n"}, False),  # its sound
        ({"sys/bus/pci/devices/0/vendor": "0x1002\n", "sys/bus/pci/devices/0/class": "0x030000\n"}, False),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n"}, False),
    ],
)
def test_an_nvidia_gpu_is_found_by_its_device_file_or_on_the_pci_bus(tmp_path, files, there):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert detection.has_nvidia_gpu(tmp_path) == there

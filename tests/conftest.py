"""Fixtures and process settings of all tests: no GPU outside tests/gpu/, SIGINT at its default."""

import gc
import signal

import pytest
import torch

# A shell starts background jobs with SIGINT ignored, and child processes inherit that: tests that interrupt a child
# need the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def without_a_gpu(request):
    """Tests that are not in tests/gpu/ compute on the CPU on any machine, and so do the processes they start."""
    if request.path.parent.name == "gpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIDDLER_DEVICE", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes started with --device
        patch.setattr(torch.version, "cuda", None)  # torch may have counted the GPUs already
        yield


@pytest.fixture
def no_collection():
    """Switch the cyclic garbage collector off: only reference counts free objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

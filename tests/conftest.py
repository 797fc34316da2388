"""What all tests need of the process they run in."""

import gc
import signal

import pytest
import torch

# Where the suite is started in the background, the shell has it ignore SIGINT, and so would every child: a test that
# interrupts one needs the default back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def without_a_gpu(request):
    """Tests that are not in tests/gpu/ compute on the CPU wherever they run, and so do the processes they start."""
    if request.path.parent.name == "gpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIDDLER_DEVICE", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # where --device is given
        patch.setattr(torch.version, "cuda", None)  # this process's torch may have asked for the GPUs already
        yield


@pytest.fixture
def no_collection():
    """What only a collection would free is not."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

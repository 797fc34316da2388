"""Numbers in pinned memory that a decode step's kernels read, set, and wait for. Needs a GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@GPU
@pytest.mark.parametrize("size", [2, 511, 513, 8194])
def test_a_steps_numbers_come_from_pinned_memory(size):
    from fiddler.offload.host_read_kernels import numbers_from_host

    host = torch.randint(-(1 << 62), 1 << 62, (size,)).pin_memory()
    numbers = torch.zeros(size + 1, dtype=torch.int64, device="cuda")
    numbers_from_host(host.data_ptr(), numbers[:-1])
    assert torch.equal(numbers.cpu(), torch.cat([host, torch.zeros(1, dtype=torch.int64)]))


@GPU
@pytest.mark.parametrize("first", [1, 2**31 - 2, 2**32 - 2, 2**40 + 7])
def test_kernels_of_a_graph_tell_numbers_and_wait_for_them(first):
    from fiddler.gpu.signal_kernels import run_each_kind, tell_and_wait
    from fiddler.offload.token_signals import Place

    memory = torch.zeros(32, dtype=torch.int32, pin_memory=True)
    signals, base = memory.numpy().view(np.uint32), torch.tensor([first], device="cuda")
    told, awaited = Place(memory.data_ptr(), 3, 5), Place(memory.data_ptr() + 64, 1, 4)
    run_each_kind(base, awaited)  # a kernel is loaded only while none waits
    tell_and_wait(base, told, awaited)
    torch.cuda.synchronize()
    assert signals[0] == (3 * first + 5) % 2**32
    for early in (1, 2**31 - 1):
        signals[0], signals[16] = 0, (first + 4 - early) % 2**32
        tell_and_wait(base, None, awaited)
        tell_and_wait(base, told, None)
        time.sleep(0.05)
        assert signals[0] == 0
        signals[16] = (first + 4 + 7) % 2**32
        torch.cuda.synchronize()
        assert signals[0] == (3 * first + 5) % 2**32

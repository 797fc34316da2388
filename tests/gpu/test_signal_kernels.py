"""Numbers in pinned memory that a decode step's kernels read, set, and wait for. Needs a GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from fiddler.models.router import rms_norm

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


@GPU
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("width", [96, 2048, 5120])
def test_activations_pass_between_gpu_and_host_unchanged_before_the_signal(width, told):
    from fiddler.gpu.signal_kernels import hand_over, take_sums
    from fiddler.offload.token_signals import Place

    memory, base = torch.zeros(16, dtype=torch.int32, pin_memory=True), torch.tensor([7], device="cuda")
    place = Place(memory.data_ptr(), 1, 2) if told else None
    x, weights, expert_ids = torch.randn(1, width, device="cuda"), torch.rand(1, 3, device="cuda"), [[7, 0, 200]]
    on_gpu, on_host = torch.zeros(width + 3, device="cuda"), torch.zeros(width + 6, pin_memory=True)
    hand_over(x, torch.tensor(expert_ids, device="cuda"), weights, on_gpu, on_host, base, place)
    torch.cuda.synchronize()
    assert memory[0] == (9 if told else 0)
    assert torch.equal(on_gpu, torch.cat([x, weights], 1)[0])
    assert torch.equal(on_host, torch.cat([x.cpu(), torch.tensor(expert_ids).float(), weights.cpu()], 1)[0])

    h, y, weight = (torch.randn(1, width, device="cuda") for _ in range(3))
    for norm in (None, weight[0]):
        host_sum = torch.randn(1, width).pin_memory()
        late, on_cpu = host_sum.numpy().copy(), host_sum.numpy()
        memory[0] = 9
        take_sums(h, y, host_sum, norm, 1e-5, base, place, place)  # compiles it
        torch.cuda.synchronize()
        memory[0] = 8
        on_cpu[:] = np.nan
        out, normalised = take_sums(h, y, host_sum, norm, 1e-5, base, None, place)
        if told:
            time.sleep(0.05)
        else:
            torch.cuda.synchronize()
        on_cpu[:] = late
        memory[0] = 9
        torch.cuda.synchronize()
        expected = h + y + torch.from_numpy(late).to("cuda")
        if not told:
            assert out.isnan().all()
        else:
            assert torch.equal(out, expected)
            if norm is None:
                assert normalised is None
            else:
                assert torch.allclose(normalised, rms_norm(expected, weight[0], 1e-5), atol=1e-5)

"""One token's division of missing experts, copies of the GPU's part, and the kernel's call with bound arrays."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from fiddler.device import cuda_driver
from fiddler.errors import ResourceError
from fiddler.kernels import ExpertFfn, KernelVariant
from fiddler.kernels.one_token import JOB, PartCopies, TokenDivision
from oracles.naive import to_bits

K, F = 3, 64
KIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def division_of(experts):
    chosen = np.zeros((1, K), np.float32)
    return chosen, TokenDivision(chosen, experts, F)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_missing_expert_s_rows_go_to_one_side_as_the_plan_for_their_number_says(data):
    """Several layers in turn: nothing of the one before is left."""
    experts = data.draw(st.integers(K, 9))
    chosen, division = division_of(experts)
    rows = [data.draw(st.lists(st.sampled_from([0, 2, 32, F]), min_size=n, max_size=n)) for n in range(K + 1)]
    plans, counts, expected_counts = division.plans(rows), np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for _ in range(3):
        missing = np.array(data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
        ids = data.draw(st.permutations(range(experts)))[:K]
        chosen[:] = ids
        expected_counts[ids] += 1
        on_gpu = dict(zip([e for e in ids if missing[e]], rows[missing[ids].sum()], strict=True))
        assert division.of_layer(missing, counts)(plans) == len(on_gpu)
        assert division.expert_ids.tolist() == [ids]
        assert division.cpu_rows.tolist() == [F - on_gpu[e] if e in on_gpu else 0 for e in range(experts)]
        streamed = [(ids.index(e), count) for e, count in on_gpu.items() if count]
        assert [(j, count) for j, count in division.gpu_rows.tolist() if count] == streamed
        assert division.gpu_rows[: len(streamed)].tolist() == [[*each] for each in streamed]
    assert counts.tolist() == expected_counts.tolist()


@pytest.mark.parametrize("wrong", [-1, 4, 1e30, np.nan, np.inf])
def test_an_expert_id_outside_the_layer_is_an_error_that_changes_nothing(wrong):
    chosen, division = division_of(4)
    chosen[:] = 0, wrong, 2
    counts = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match=r"lies outside 0\.\.3"):
        division.of_layer(np.ones(4, np.bool_), counts)(division.plans([(0,) * n for n in range(K + 1)]))
    assert not counts.any()
    assert not division.cpu_rows.any()


@pytest.mark.parametrize(
    "call",
    [
        lambda division: TokenDivision(np.zeros((2, K), np.float32), 4, F),
        lambda division: TokenDivision(np.zeros((1, K)), 4, F),
        lambda division: division.of_layer(np.ones(5, np.bool_), np.zeros(4, np.int64)),
        lambda division: division.of_layer(np.ones(4, np.bool_), np.zeros(4)),
        lambda division: division.plans([(0,) * n for n in range(K)]),
        lambda division: division.plans([(F + 2,) * n for n in range(K + 1)]),
        lambda division: copies_of(division, np.zeros((3, 4, 8), np.uint8), jobs=np.zeros((K, JOB))),
    ],
)
def test_arrays_that_do_not_fit_are_errors(call):
    with pytest.raises(ValueError):
        call(division_of(4)[1])


def copies_of(division, memory, function=0, borders=(), jobs=None, target=(0, 0)):
    """memory: [3, E, bytes], matrices of two bytes a weight in gate and up; down has blocks of 32 in 34 bytes."""
    addresses = memory.ctypes.data + np.arange(3)[:, None] * memory.strides[0]
    matrices = addresses + np.arange(memory.shape[1]) * memory.strides[1]
    jobs = np.zeros((K, JOB), np.int64) if jobs is None else jobs
    return PartCopies(division, matrices, (WIDTH * 2, WIDTH * 2), (32, 34), WIDTH, target, (function, 5, borders), jobs)


WIDTH = 24
ROWS, DOWN = WIDTH * 2, WIDTH * F // 32 * 34


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_copies_bring_the_last_hidden_rows_in_jobs_and_cross_no_border(data):
    experts, rng = 5, np.random.default_rng(data.draw(st.integers(0, 99)))
    memory = rng.integers(0, 256, (3, experts, F * ROWS), dtype=np.uint8)
    offsets = 2 * data.draw(st.lists(st.integers(0, memory.nbytes), max_size=8))  # each twice
    borders = tuple(memory.ctypes.data + offset for offset in sorted(offsets))
    ring, jobs, pieces = np.zeros(K * 3 * (F * ROWS + 16), np.uint8), np.full((K, JOB), -1), []

    @KIND
    def copy(target, source, nbytes, stream):
        pieces.append((source, source + nbytes, stream))
        ctypes.memmove(target, source, nbytes)
        return 0

    chosen, division = division_of(experts)
    function = ctypes.cast(copy, ctypes.c_void_p).value
    copies = copies_of(division, memory, function, borders, jobs, (ring.ctypes.data, ring.nbytes))
    chosen[:] = ids = data.draw(st.permutations(range(experts)))[:K]
    rows = data.draw(st.sampled_from([(F, F, F), (F, 32, 0), (0, F, 0), (32, 0, 0), (0, 0, 0)]))
    plans = division.plans([*[(0,) * n for n in range(K)], rows])
    division.of_layer(np.ones(experts, np.bool_), np.zeros(experts, np.int64))(plans)
    assert copies() == 0
    assert not any(begin < border < end for begin, end, _ in pieces for border in borders)
    assert all(begin < end and stream == 5 for begin, end, stream in pieces)
    on_gpu = [(j, count) for j, count in enumerate(rows) if count]
    assert jobs[:, 3:].tolist() == [[count, j] for j, count in on_gpu] + [[0, 0]] * (K - len(on_gpu))
    for part, (j, count) in enumerate(on_gpu):
        assert not (jobs[part, :3] % 16 - ring.ctypes.data % 16).any()
        for matrix in (0, 1):
            there = jobs[part, matrix] - ring.ctypes.data
            expected = memory[matrix, ids[j], (F - count) * ROWS :]
            np.testing.assert_array_equal(ring[there : there + count * ROWS], expected)
        there, down = jobs[part, 2] - ring.ctypes.data, memory[2, ids[j], :DOWN].reshape(WIDTH, -1)
        if count == F:
            np.testing.assert_array_equal(ring[there : there + DOWN], down.reshape(-1))
        else:
            target, source, row_bytes, pitch = copies.columns(part)
            assert (target, row_bytes, pitch) == (jobs[part, 2], count // 32 * 34, F // 32 * 34)
            assert source == down.ctypes.data + pitch - row_bytes


def test_the_first_copy_that_fails_ends_the_others_and_names_the_driver_s_error():
    memory, calls = np.zeros((3, 4, F * ROWS), np.uint8), []

    @KIND
    def fails(target, source, nbytes, stream):
        calls.append(source)
        return 0 if len(calls) < 3 else 700

    chosen, division = division_of(4)
    chosen[:] = 1, 2, 3
    copies = copies_of(division, memory, ctypes.cast(fails, ctypes.c_void_p).value, target=(1 << 20, 1 << 20))
    plans = division.plans([(F,) * n for n in range(K + 1)])
    division.of_layer(np.ones(4, np.bool_), np.zeros(4, np.int64))(plans)
    assert copies() == 700
    assert len(calls) == 3
    with pytest.raises(ResourceError, match="driver error 700"):
        cuda_driver.check_copy(700)
    cuda_driver.check_copy(0)


def test_a_bound_call_gives_the_bits_of_a_call_for_whatever_its_arrays_hold():
    experts, width, hidden = 6, 96, 64
    rng, variant = np.random.default_rng(0), KernelVariant(kernels.choose_tier(), "bf16", "bf16")
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    ffn = ExpertFfn(*(to_bits(rng.normal(size=shape), "bf16") for shape in shapes), variant)
    x, out = np.zeros((1, width), np.float32), np.zeros((1, width), np.float32)
    ids, weights, rows = np.zeros((1, K), np.int64), np.zeros((1, K), np.float32), np.zeros(experts, np.int64)
    call = ffn.bind(x, ids, weights, rows, out)
    for _ in range(5):
        x[:], ids[:], weights[:] = rng.normal(size=width), rng.permutation(experts)[:K], rng.random(K)
        rows[:] = 2 * rng.integers(0, hidden // 2 + 1, experts)
        call()
        np.testing.assert_array_equal(out, ffn(x, ids, weights, rows))
    ids[0, 1] = experts
    with pytest.raises(ValueError, match=r"outside 0\.\.5"):
        call()
    for arrays in ((x, ids.astype(np.int32), weights, rows), (x, ids, weights.astype(float), rows)):
        with pytest.raises(ValueError, match="to bind"):
            ffn.bind(*arrays, out)
    with pytest.raises(ValueError, match="out is"):
        ffn.bind(x, ids, weights, rows, out[0])

"""The matrix kernels against float64, in every tier this CPU runs and in processes limited to fewer CPU features."""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from fiddler.errors import RequestError
from fiddler.kernels import KernelVariant
from fiddler.kernels.machine import threads
from oracles import naive

BEST = kernels.available_tiers()[0]
# bf16 in every tier, since each has its own tiles; other variants in the best tier, f16 also in the portable one
VARIANTS = [
    *(KernelVariant(tier, "bf16", "bf16") for tier in kernels.available_tiers()),
    KernelVariant(BEST, "bf16", "f32"),
    KernelVariant(BEST, "f16", "f32"),
    KernelVariant(BEST, "f16", "bf16"),
    KernelVariant(kernels.TIERS[-1], "f16", "f32"),
]
ALL = pytest.mark.parametrize("variant", VARIANTS, ids=lambda p: f"{p.tier.name}-{p.weights}-{p.activations}")


def case(seed, tokens, experts, k, width, hidden, kind):
    rng = np.random.default_rng(seed)
    gate, up = (naive.to_bits(rng.normal(size=(experts, hidden, width)) / width**0.5, kind) for _ in range(2))
    down = naive.to_bits(rng.normal(size=(experts, width, hidden)) / hidden**0.5, kind)
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    expert_ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], np.int64).reshape(tokens, k)
    routing_weights = rng.random((tokens, k)).astype(np.float32)
    return x, expert_ids, routing_weights, gate, up, down


def check_expert_ffn(args, variant):
    y = kernels.expert_ffn(*args, variant)
    expected, tolerance = naive.expert_ffn(*args, variant.weights, rounded=variant.activations == "bf16")
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    assert (np.abs(y - expected) <= tolerance).all()


@ALL
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_expert_ffn_matches_the_float64_oracle(variant, data):
    experts = data.draw(st.integers(1, 6))
    args = case(
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.one_of(st.integers(0, 8), st.integers(9, 130))),
        experts,
        data.draw(st.integers(1, min(3, experts))),
        data.draw(st.integers(1, 140)),
        data.draw(st.integers(1, 140)),
        variant.weights,
    )
    check_expert_ffn(args, variant)


@ALL
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_expert_ffn_of_the_first_hidden_rows_gives_their_part_of_the_sum(variant, data):
    experts, hidden = data.draw(st.integers(1, 5)), 2 * data.draw(st.integers(1, 70))
    tokens, width = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 140))
    args = case(data.draw(st.integers(0, 2**32 - 1)), tokens, experts, 1, width, hidden, variant.weights)
    rows = np.array([2 * data.draw(st.integers(0, hidden // 2)) for _ in range(experts)])
    y = kernels.expert_ffn(*args, variant, rows)
    x, expert_ids, routing_weights, gate, up, down = args
    left_out = np.arange(hidden) >= rows[:, None]  # [E, F]
    gate, up = (np.where(left_out[:, :, None], np.uint16(0), bits) for bits in (gate, up))
    rounded = variant.activations == "bf16"
    expected, tolerance = naive.expert_ffn(
        x, expert_ids, routing_weights, gate, up, down, variant.weights, rounded=rounded
    )
    assert (np.abs(y - expected) <= tolerance).all()


@ALL
@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 130), rows=st.integers(1, 150), width=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_linear_matches_a_float64_matrix_product(variant, tokens, rows, width, seed):
    rng = np.random.default_rng(seed)
    w = naive.to_bits(rng.normal(size=(rows, width)), variant.weights)
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    rounded = naive.round_bf16(x) if variant.activations == "bf16" else x.astype(np.float64)
    exact = naive.from_bits(w, variant.weights).T
    error = np.abs(kernels.linear(x, w, variant) - rounded @ exact)
    assert (error <= naive.EPSILON * (np.abs(rounded) @ np.abs(exact))).all()


@ALL
def test_tokens_that_all_go_to_one_expert_match_the_float64_oracle(variant):
    x, expert_ids, routing_weights, *w = case(1, 70, 4, 1, 96, 66, variant.weights)
    expert_ids[:] = 2
    check_expert_ffn((x, expert_ids, routing_weights, *w), variant)


@ALL
@pytest.mark.parametrize("tokens", [1, 5, 21, 40])
def test_expert_ffn_gives_the_same_bits_on_one_thread_and_on_all(variant, tokens, monkeypatch):
    monkeypatch.setattr(threads, "_PARALLEL_FROM", 0)  # else so little work stays on one thread
    args = case(2, tokens, 5, 2, 130, 98, variant.weights)
    before = kernels.thread_count()
    try:
        kernels.set_threads(1)
        alone = kernels.expert_ffn(*args, variant)
        kernels.set_threads(None)
        together = kernels.expert_ffn(*args, variant)
    finally:
        kernels.set_threads(before)
    np.testing.assert_array_equal(alone.view(np.uint32), together.view(np.uint32))


@ALL
def test_weights_at_any_even_address_give_the_same_bits(variant):
    rng = np.random.default_rng(6)
    rows, width = 70, 96
    w = naive.to_bits(rng.normal(size=(rows, width)), variant.weights)
    memory = np.empty(w.size + 64, np.uint16)
    for tokens in (1, 4, 18, 33):
        x = rng.normal(size=(tokens, width)).astype(np.float32)
        expected = kernels.linear(x, w, variant)
        for shift in (1, 2, 15, 31):
            memory[shift : shift + w.size] = w.reshape(-1)
            moved = memory[shift : shift + w.size].reshape(rows, width)
            np.testing.assert_array_equal(kernels.linear(x, moved, variant), expected)


@ALL
def test_denormal_weights_are_exact_or_flushed_to_zero(variant):
    """float32 arithmetic is exact on bf16's smallest values; the CPU's bf16 dot product flushes them to zero."""
    w = np.array([[0x0001, 0x007F, 0x8001, 0x0080] * 64] * 40, np.uint16)  # as f16 they are subnormal, too
    for tokens in (1, 4, 20):
        x = np.ones((tokens, w.shape[1]), np.float32)
        exact = naive.from_bits(w, variant.weights).sum(axis=1)
        y = kernels.linear(x, w, variant)
        normal = naive.from_bits(w[:, 3::4], variant.weights).sum(axis=1) if variant.bf16_pairs else exact
        assert np.isclose(y, exact, rtol=1e-6, atol=0).all() or np.isclose(y, normal, rtol=1e-6, atol=0).all()
    w, x = w[:, :4].copy(), x[:1, :4].copy()  # a row shorter than a vector
    np.testing.assert_allclose(kernels.linear(x, w, variant)[0], naive.from_bits(w, variant.weights).sum(axis=1), 1e-6)


@ALL
def test_kernels_read_nothing_past_the_end_of_a_mapping(variant, tmp_path):
    """Weights of odd sizes end with the last mapped page: one element too far would be a segmentation fault."""
    rng = np.random.default_rng(3)
    rows, width = 37, 51
    w = naive.to_bits(rng.normal(size=(rows, width)), variant.weights)
    page = mmap.PAGESIZE
    path = tmp_path / "weights"
    path.write_bytes(bytes(page - w.nbytes % page) + w.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(mapped, np.uint16, w.size, len(mapped) - w.nbytes).reshape(rows, width)
    assert not view.flags.writeable
    for tokens in (1, 3, 33):
        x = rng.normal(size=(tokens, width)).astype(np.float32)
        np.testing.assert_array_equal(kernels.linear(x, view, variant), kernels.linear(x, w, variant))


@ALL
def test_nan_and_infinity_pass_through_linear(variant):
    rng = np.random.default_rng(4)
    for tokens in (1, 6, 40):
        w = naive.to_bits(rng.normal(size=(32, 70)), variant.weights)
        x = rng.normal(size=(tokens, 70)).astype(np.float32)
        x[0, 69] = np.nan
        y = kernels.linear(x, w, variant)
        assert np.isnan(y[0]).all()
        assert np.isfinite(y[1:]).all()
        x[0, 69] = np.inf
        w[5, 69] = naive.to_bits(np.array([1.0]), variant.weights)[0]
        assert kernels.linear(x, w, variant)[0, 5] == np.inf


@pytest.mark.parametrize("tier", [BEST, kernels.TIERS[-1]], ids=lambda tier: tier.name)
def test_every_f16_value_is_read_exactly(tier):
    """All 65536, subnormals, infinities and NaNs included, each times one: in rows of one element and of vectors."""
    for width in (1, 128):
        w, values = naive.every_f16(width)
        y = kernels.linear(np.ones((1, width), np.float32), w, KernelVariant(tier, "f16", "f32"))[0]
        np.testing.assert_array_equal(y, values)


def test_activations_round_to_bf16_ties_to_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.00390625, 3.3895e38, 65504.0, 1e-30], np.float32)
    one = naive.to_bits(np.ones((1, 1)), "bf16")
    for variant in (KernelVariant(BEST, "bf16", "bf16"), KernelVariant(kernels.TIERS[-1], "bf16", "bf16")):
        y = kernels.linear(values[:, None].copy(), one, variant)[:, 0]
        np.testing.assert_array_equal(y, naive.round_bf16(values).astype(np.float32))


def test_matrix_kernels_refuse_arguments_of_the_wrong_shape_type_or_range():
    variant = VARIANTS[0]
    x, expert_ids, routing_weights, gate, up, down = case(5, 3, 4, 2, 16, 24, "bf16")
    bad = [
        (x.astype(np.float64), expert_ids, routing_weights, gate, up, down),
        (x[:, :8], expert_ids, routing_weights, gate, up, down),
        (x, expert_ids[:2], routing_weights, gate, up, down),
        (x, expert_ids + 3, routing_weights, gate, up, down),
        (x, expert_ids - 5, routing_weights, gate, up, down),
        (x, expert_ids, routing_weights[:, :1], gate, up, down),
        (x, expert_ids, routing_weights, gate[:, :8], up, down),
        (x, expert_ids, routing_weights, gate, up, down[:, :, :8]),
        (x, expert_ids, routing_weights, gate[:, ::-1], up, down),
        (x, expert_ids, routing_weights, gate.astype(np.float32), up, down),
        (x, expert_ids.astype(np.float32), routing_weights, gate, up, down),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            kernels.expert_ffn(*arguments, variant)
    for rows in ([24, 24, 24], [24, 24, 24, 26], [24, 24, 24, -2], [24, 24, 24, 3], [24.0, 2.0, 2.0, 2.0]):
        with pytest.raises(ValueError, match="hidden_rows"):
            kernels.expert_ffn(x, expert_ids, routing_weights, gate, up, down, variant, np.array(rows))
    for bad_x, bad_w in ((x[0], gate[0]), (x, gate), (x, gate[0].T), (x, gate[0].astype(np.int16))):
        with pytest.raises(ValueError):
            kernels.linear(bad_x, bad_w, variant)


def test_a_variant_that_no_kernel_computes_is_refused():
    for weights, activations in (("q9", "f32"), ("bf16", "q8"), ("q8_0", "bf16"), ("f16", "")):
        with pytest.raises(ValueError, match="no kernel"):
            KernelVariant(BEST, weights, activations)
    beyond = dataclasses.replace(BEST, name="avx9")
    with pytest.raises(ValueError, match="avx9"):
        KernelVariant(beyond, "bf16", "bf16")


def test_a_tier_is_chosen_by_name_or_environment_and_an_unknown_one_refused(monkeypatch):
    with pytest.raises(RequestError, match="'avx1024'"):
        kernels.choose_tier("avx1024")
    monkeypatch.setenv("FIDDLER_KERNEL", "portable")
    assert kernels.choose_tier().name == "portable"
    assert kernels.choose_tier(BEST.name) is BEST


def run_apart(script, cache_folder, **environment):
    """Run a script in a new process, with these variables, the oracles importable and an empty kernel cache."""
    environment["NUMBA_CACHE_DIR"] = str(cache_folder)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


LOWER_TIER = """
import numpy as np
from oracles import naive
from fiddler import kernels
assert [tier.name for tier in kernels.available_tiers()][0] == {tier!r}, kernels.available_tiers()
variant = kernels.KernelVariant(kernels.choose_tier(), {weights!r}, {activations!r})
assert variant.tuning.name == {tuning!r}
assert variant.k_blocked == (variant.bf16_pairs and {tuning!r}.startswith("zen"))
rng = np.random.default_rng(0)
for tokens, width in ((1, 64), (4, 1300), (5, 1300), (7, 51), (8, 2600), (14, 1300), (24, 130), (33, 130), (64, 130)):
    w = naive.to_bits(rng.normal(size=(40, width)), {weights!r})
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    if {activations!r} == "bf16":
        x = naive.from_bits(naive.to_bits(x, "bf16"), "bf16").astype(np.float32)
    expected = x.astype(np.float64) @ naive.from_bits(w, {weights!r}).T
    error = np.linalg.norm(kernels.linear(x, w, variant) - expected) / np.linalg.norm(expected)
    assert error < 1e-6, error
if {weights!r} == "f16":
    assert variant.tier.half_convert == ("f16c" in {features!r})
    for width in (1, 128):
        w, values = naive.every_f16(width)
        np.testing.assert_array_equal(kernels.linear(np.ones((1, width), np.float32), w, variant)[0], values)
"""


EMULATED_PAIRS = """
import dataclasses, numpy as np
from llvmlite import ir
from oracles import naive
from fiddler import kernels
from fiddler.kernels.machine import isa
from fiddler.kernels.codegen import variant as variants
from fiddler.kernels.matmul import dot_tiles as tiles, outer_tiles

def dot_of_pairs(b, total, left, right):
    sixteen, mask = (ir.Constant(left.type, [value] * 16) for value in (16, -65536))
    for half in (lambda words: b.shl(words, sixteen), lambda words: b.and_(words, mask)):
        total = b.fadd(total, b.fmul(*(b.bitcast(half(words), total.type) for words in (left, right))))
    return total

tiles.dot_bf16 = outer_tiles.dot_bf16 = dot_of_pairs
isa.TIERS = variants.TIERS = tuple(dataclasses.replace(tier, needs=frozenset()) for tier in isa.TIERS)
variant = kernels.KernelVariant(kernels.choose_tier("avx512_bf16"), "bf16", "bf16")
assert variant.bf16_pairs and variant.k_blocked == {tuning!r}.startswith("zen")
rng = np.random.default_rng(0)
for tokens, width, hidden in ((1, 64, 32), (4, 130, 66), (5, 1300, 34), (7, 51, 40), (8, 2600, 34), (14, 1300, 34),
                              (25, 130, 96), (28, 258, 34), (33, 130, 66), (64, 258, 130), (130, 66, 40)):
    gate, up = (naive.to_bits(rng.normal(size=(1, hidden, width)) / width**0.5, "bf16") for _ in range(2))
    down = naive.to_bits(rng.normal(size=(1, width, hidden)) / hidden**0.5, "bf16")
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    args = x, np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32), gate, up, down
    expected, tolerance = naive.expert_ffn(*args, "bf16", rounded=True)
    assert (np.abs(kernels.expert_ffn(*args, variant) - expected) <= tolerance).all(), tokens
"""


@pytest.mark.skipif(BEST.dot_bf16, reason="this CPU has the bf16 dot-product instruction")
@pytest.mark.parametrize("tuning", ["intel", "zen4"])
def test_bf16_pair_kernels_match_the_oracle_with_the_instruction_emulated(tuning, tmp_path):
    """All code around the bf16 dot product, which float32 arithmetic replaces: as on Zen, and as on other CPUs."""
    run_apart(EMULATED_PAIRS.format(tuning=tuning), tmp_path, FIDDLER_TUNING=tuning)


@pytest.mark.parametrize(
    ("tier", "weights", "activations", "tuning"),
    [
        ("portable", "f16", "f32", "portable"),
        ("avx2", "f16", "f32", "zen3"),
        ("avx512", "bf16", "f32", "intel"),
        ("avx512_bf16", "bf16", "bf16", "intel_amx"),
        ("avx512_bf16", "bf16", "bf16", "zen5"),
    ],
)
def test_a_cpu_with_fewer_features_gets_a_lower_tier_and_right_results(tier, weights, activations, tuning, tmp_path):
    """In a new process compiled for a CPU with only these features: Numba fixes them when it starts."""
    needed = next(t for t in kernels.TIERS if t.name == tier)
    if needed not in kernels.available_tiers():
        pytest.skip(f"this CPU has no {tier}")
    features = ",".join(f"+{feature}" for feature in sorted(needed.needs | ({"avx"} if needed.needs else set())))
    cpu = "x86-64" if needed.needs else "generic"
    script = LOWER_TIER.format(tier=tier, weights=weights, activations=activations, tuning=tuning, features=features)
    run_apart(script, tmp_path, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, FIDDLER_TUNING=tuning)

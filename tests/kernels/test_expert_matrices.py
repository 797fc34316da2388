"""Experts that lie apart give the bits of a stack of them, in every kernel that takes experts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from fiddler.kernels import ExpertMatrices, KernelVariant
from oracles.naive import to_bits

VARIANTS = [
    *(KernelVariant(tier, "bf16", "bf16") for tier in kernels.available_tiers()),
    KernelVariant(kernels.choose_tier(), "f16", "f32"),
]
ALL = pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: f"{each.tier.name}-{each.weights}")


def apart(stack, order):
    """Copies of a stack's matrices that lie in memory in another order, with gaps of NaNs between them."""
    experts, rows, columns = stack.shape
    gap = 96
    memory = np.full(experts * (rows * columns + gap), 0x7FFF, np.uint16)
    matrices = [None] * experts
    for place, expert in enumerate(order):
        begin = place * (rows * columns + gap)
        matrices[expert] = memory[begin : begin + rows * columns].reshape(rows, columns)
        matrices[expert][:] = stack[expert]
    memory.flags.writeable = False
    return ExpertMatrices.of(matrices)


@ALL
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_experts_apart_give_the_bits_of_a_stack(variant, data):
    experts, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    width, hidden = data.draw(st.integers(1, 140)), 2 * data.draw(st.integers(1, 60))
    tokens = data.draw(st.one_of(st.integers(0, 8), st.integers(9, 130)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    stacks = [to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, variant.weights) for shape in shapes]
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    expert_ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)]).reshape(tokens, min(k, experts))
    inputs = x, expert_ids.astype(np.int64), rng.random(expert_ids.shape).astype(np.float32)
    rows = data.draw(st.sampled_from([None, 2 * rng.integers(0, hidden // 2 + 1, experts)]))
    matrices = [apart(stack, rng.permutation(experts)) for stack in stacks]
    expected = kernels.expert_ffn(*inputs, *stacks, variant, rows)
    np.testing.assert_array_equal(kernels.expert_ffn(*inputs, *matrices, variant, rows), expected)
    mixed = matrices[0], stacks[1], matrices[2]
    np.testing.assert_array_equal(kernels.expert_ffn(*inputs, *mixed, variant, rows), expected)


@ALL
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_compiled_step_of_experts_apart_gives_the_bits_of_stacks(variant, tokens):
    rng, layers, width, hidden, experts, vocabulary = np.random.default_rng(tokens), 3, 34, 46, 5, 9

    def bits(*shape):
        return to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, variant.weights)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    shapes = {"gate": (experts, hidden, width), "up": (experts, hidden, width), "down": (experts, width, hidden)}
    stacked = [
        kernels.BlockWeights(
            floats(width), bits(32, width), bits(16, width), bits(16, width), bits(width, 32), floats(width),
            floats(experts, width), **{name: ExpertMatrices.of(bits(*shape)) for name, shape in shapes.items()},
        )
        for _ in range(layers)
    ]  # fmt: skip
    single = [
        dataclasses.replace(
            block, **{name: apart(getattr(block, name).memory, rng.permutation(experts)) for name in shapes}
        )
        for block in stacked
    ]
    output_norm, output, table = floats(width), bits(vocabulary, width), bits(vocabulary, width)
    table = table.view(np.float16) if variant.weights == "f16" else table
    frequencies, results = np.array([1, 0.1, 0.01, 0.001], np.float32), []
    kind = np.uint16 if variant.activations == "bf16" else np.float32
    tables = [np.array([n]) for n in range(tokens)]
    for blocks in (stacked, single):
        step = kernels.CompiledDecodeStep(table, blocks, output_norm, output, variant, frequencies, 1e-5, 2, None)
        pool, outputs = np.zeros((tokens, layers, 2, 2, 8, 8), kind), []
        for position in range(4):
            h, logits, spans = step.step(
                [(position + n) % vocabulary for n in range(tokens)], pool, tables, [position] * tokens
            )
            outputs += [h, logits, spans.expert_ids, [nbytes for *_, nbytes in step.spans(spans)]]
        results.append(outputs)
    for theirs, ours in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_views_and_addresses_are_those_of_the_matrices():
    stack = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    for matrices in (ExpertMatrices.of(stack), ExpertMatrices.of([stack[0], stack[1]])):
        assert (len(matrices), matrices.shape, matrices.dtype) == (2, (2, 3, 4), np.uint16)
        assert matrices.addresses.tolist() == [stack[0].ctypes.data, stack[1].ctypes.data]
        for each, expected in zip(matrices, stack, strict=True):
            assert each.ctypes.data == expected.ctypes.data
        assert matrices[1].tolist() == stack[1].tolist()


def test_matrices_that_are_no_experts_of_one_layer_are_refused():
    stack = np.zeros((2, 3, 4), np.uint16)
    for bad, says in (
        (stack[0], r"uint16 \(3, 4\); expected contiguous \[E, rows, columns\]"),
        (stack[:, ::-1], "expected contiguous"),
        ([], "no experts"),
        ([stack], r"expert 0 is uint16 \(2, 3, 4\)"),
        ([stack[0], stack[0, :2]], r"expert 1 is uint16 \(2, 4\), expert 0 uint16 \(3, 4\)"),
        ([stack[0], stack[1].astype(np.int16)], "expert 1 is int16"),
        ([stack[0], stack[1, ::-1]], "expert 1 is not contiguous"),
    ):
        with pytest.raises(ValueError, match=says):
            ExpertMatrices.of(bad)

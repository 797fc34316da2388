"""The compiled decode step against the separate kernel calls that it replaces, bit by bit."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fiddler
from fiddler import kernels
from fiddler.telemetry.recorder import Meter
from fiddler.telemetry.timeline import Tracer
from oracles.naive import to_bits
from oracles.paged import to_pool
from oracles.step_by_step import one_by_one, with_gpt_oss_parts
from oracles.synthetic import write_random_mixtral

EPSILON = 1e-5


def weights_of(rng, variant, layers, width, hidden, experts, groups, heads_per_group, head_dim, vocabulary):
    """Random weights of a small model: blocks, the final norm, output and embeddings."""

    def bits(*shape):
        return to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, variant.weights)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    queries, keys = groups * heads_per_group * head_dim, groups * head_dim
    blocks = [
        kernels.BlockWeights(
            attn_norm=floats(width),
            attn_q=bits(queries, width),
            attn_k=bits(keys, width),
            attn_v=bits(keys, width),
            attn_output=bits(width, queries),
            ffn_norm=floats(width),
            ffn_gate_inp=floats(experts, width),
            gate=kernels.ExpertMatrices.of(bits(experts, hidden, width)),
            up=kernels.ExpertMatrices.of(bits(experts, hidden, width)),
            down=kernels.ExpertMatrices.of(bits(experts, width, hidden)),
        )
        for _ in range(layers)
    ]
    return blocks, floats(width), bits(vocabulary, width), bits(vocabulary, width)


def variant_for(name):
    weights, activations = name.split("-")
    return kernels.KernelVariant(kernels.choose_tier(), weights, activations)


@pytest.mark.parametrize("name", ["bf16-bf16", "bf16-f32", "f16-f32"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_compiled_step_equals_its_separate_kernel_calls(name, data):
    variant = variant_for(name)
    layers, groups, heads_per_group, pairs, experts = (data.draw(st.integers(1, limit)) for limit in (3, 3, 3, 8, 5))
    width, hidden, tokens = (data.draw(st.integers(1, limit)) for limit in (70, 90, 18))
    experts_used, window = data.draw(st.integers(1, experts)), data.draw(st.one_of(st.none(), st.integers(1, 12)))
    rng, vocabulary = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), 9
    blocks, output_norm, output, embeddings = weights_of(
        rng, variant, layers, width, hidden, experts, groups, heads_per_group, 2 * pairs, vocabulary
    )
    parts, windows = kernels.BlockParts(), [window] * layers
    if data.draw(st.booleans()):
        blocks = list(with_gpt_oss_parts(rng, blocks, 2 * pairs))
        parts, windows = kernels.BlockParts(clamped=True, every_second=True), [window, None, window][:layers]
    frequencies = (1 / 10000 ** (np.arange(pairs) / pairs)).astype(np.float32)
    capacities = [data.draw(st.integers(1, 20)) for _ in range(tokens)]
    positions = [data.draw(st.integers(0, capacity - 1)) for capacity in capacities]
    kind = np.float16 if variant.activations == "bf16" else np.float32

    def random_cache():
        arrays = [rng.normal(size=(layers, groups, capacity, 2 * pairs)).astype(kind) for capacity in capacities]
        return [array.view(np.uint16) if kind == np.float16 else array for array in arrays]

    pool, tables = to_pool(random_cache(), random_cache(), data.draw(st.integers(1, 9)))
    after = pool.copy()
    ids = rng.integers(0, vocabulary, tokens).tolist()
    table = embeddings.view(np.float16) if variant.weights == "f16" else embeddings
    x = table[ids].astype(np.float32)
    if variant.weights == "bf16":
        x = (embeddings[ids].astype(np.uint32) << 16).view(np.float32)
    compiled = kernels.CompiledDecodeStep(
        table, blocks, output_norm, output, variant, frequencies, EPSILON, experts_used, window, parts
    )
    h, logits, _ = compiled.step(ids, after, tables, positions)
    expected = one_by_one(
        blocks, output_norm, output, variant, frequencies, experts_used, windows, x, pool, tables, positions, EPSILON
    )
    np.testing.assert_array_equal(h, expected[0])
    np.testing.assert_array_equal(logits, expected[1])
    np.testing.assert_array_equal(after, pool)


@pytest.mark.parametrize("name", ["bf16-bf16", "bf16-f32", "f16-f32"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_of_dense_layers_equals_that_of_layers_with_one_expert(name, layers):
    """The same weights, bit by bit: the router of one expert gives it the weight 1."""
    variant = variant_for(name)
    blocks, output_norm, output, embeddings = weights_of(
        np.random.default_rng(3), variant, layers, 34, 46, 1, 2, 2, 8, 9
    )
    dense = [
        dataclasses.replace(
            block, ffn_gate_inp=None, gate=None, up=None, down=None,
            dense_gate=block.gate[0], dense_up=block.up[0], dense_down=block.down[0],
        )
        for block in blocks
    ]  # fmt: skip
    table = embeddings.view(np.float16) if variant.weights == "f16" else embeddings
    kind = np.uint16 if variant.activations == "bf16" else np.float32
    frequencies, results = np.array([1, 0.1, 0.01, 0.001], np.float32), []
    for used, each in ((1, blocks), (0, dense)):
        step = kernels.CompiledDecodeStep(table, each, output_norm, output, variant, frequencies, EPSILON, used, 3)
        pool, tables = np.zeros((4, layers, 2, 2, 6, 8), kind), [np.array([sequence]) for sequence in range(4)]
        outputs = [step.step([1, 4, 7, 8], pool, tables, [position] * 4) for position in range(6)]
        assert sum(nbytes for *_, nbytes in step.spans(outputs[-1][2])) > 0
        results.append([array for *arrays, _ in outputs for array in arrays])
    for sparse, own in zip(*results, strict=True):
        np.testing.assert_array_equal(sparse, own)


def test_blocks_without_experts_are_refused_where_experts_are_used():
    variant = variant_for("bf16-f32")
    blocks, output_norm, output, embeddings = weights_of(np.random.default_rng(3), variant, 2, 8, 6, 2, 1, 1, 4, 9)
    without = dataclasses.replace(blocks[1], ffn_gate_inp=None, gate=None, up=None, down=None)
    frequencies = np.ones(2, np.float32)
    for each, used, says in (
        ([blocks[0], without], 0, "must be the first ones"),
        ([without], 1, "1 of 0 experts"),
        ([without], 0, "neither routed experts nor a dense feed-forward"),
        ([], 0, "no blocks"),
    ):
        with pytest.raises(ValueError, match=says):
            kernels.CompiledDecodeStep(embeddings, each, output_norm, output, variant, frequencies, EPSILON, used, None)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("decode") / "tiny.gguf")


@pytest.fixture(params=["fast", "exact"])
def engine(path, request):
    return fiddler.load(path, device="cpu", precision=request.param)


def steps(runner, batch_size):
    """Hidden states and logits of four decode steps after prompts of different lengths."""
    sequences, results = [runner.sequence() for _ in range(batch_size)], []
    for n, sequence in enumerate(sequences):
        runner.prefill(sequence, list(range(3, 5 + 7 * n)))
    for token in range(4):
        results += runner.step([(sequence, [10 * n + token]) for n, sequence in enumerate(sequences)])[:2]
    assert [sequence.length for sequence in sequences] == [2 + 7 * n + 4 for n in range(batch_size)]
    return results


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_compiled_step_gives_the_bits_of_the_step_in_torch(engine, batch_size, monkeypatch):
    compiled = steps(engine.runner, batch_size)
    monkeypatch.setattr(engine.runner, "_decoder", None)
    for ours, theirs in zip(compiled, steps(engine.runner, batch_size), strict=True):
        assert torch.equal(ours, theirs)


def test_the_logits_of_a_compiled_step_stay_while_later_steps_run(engine):
    runner, sequence = engine.runner, engine.runner.sequence()
    hidden, logits, _ = runner.step([(sequence, [5])])
    copy = logits.clone()
    runner.step([(sequence, [7])])[1].zero_()
    assert torch.equal(logits, copy)
    assert torch.equal(runner.logits(hidden), copy)


def test_a_step_with_the_same_sequence_twice_is_refused(engine):
    sequence = engine.runner.sequence()
    with pytest.raises(AssertionError, match="twice"):
        engine.runner.step([(sequence, [5]), (sequence, [6])])
    assert sequence.length == 0


def test_threads_that_share_a_runner_get_their_own_results(engine):
    """They queue for the kernels; Python switches between them every microsecond."""
    runner = engine.runner

    def many(batch_size):
        sequences = [runner.sequence() for _ in range(batch_size)]
        results = []
        for token in range(40):
            results += runner.step([(sequence, [token + n]) for n, sequence in enumerate(sequences)])[:2]
        return results

    expected, before = {batch_size: many(batch_size) for batch_size in (1, 9)}, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for batch_size, results in zip((1, 9, 1, 9), pool.map(many, (1, 9, 1, 9)), strict=True):
                assert all(map(torch.equal, results, expected[batch_size]))
    finally:
        sys.setswitchinterval(before)


def test_a_compiled_step_records_the_same_bytes_as_separate_calls(path, monkeypatch):
    """Its spans lie within the step, in order."""
    tracer = Tracer()
    runner = fiddler.load(path, device="cpu", recorder=tracer).runner
    sequences = [runner.sequence() for _ in range(3)]
    parts = [(sequence, [n + 5]) for n, sequence in enumerate(sequences)]
    began = time.perf_counter()
    runner.step(parts)
    ended = time.perf_counter()
    read, spans = dict(tracer.nbytes), [(span.begun, span.ended) for span in tracer.spans()]
    assert all(a < b for a, b in spans)
    assert sorted(spans) == spans
    assert began <= spans[0][0] <= spans[-1][1] <= ended
    assert set(tracer.seconds) == {"dense", "experts"}
    tracer.clear()
    monkeypatch.setattr(runner, "_decoder", None)
    for sequence in sequences:
        sequence.truncate(0)
    runner.step(parts)
    assert dict(tracer.nbytes) == read
    assert isinstance(tracer, Meter)


def test_the_compiled_step_refuses_arguments_of_the_wrong_shape_type_or_range():
    rng, variant = np.random.default_rng(0), variant_for("bf16-bf16")
    blocks, output_norm, output, table = weights_of(rng, variant, 2, 8, 6, 3, 2, 2, 4, 11)
    floats, bits = partial(np.ones, dtype=np.float32), partial(np.ones, dtype=np.uint16)
    small = {"attn_bias": 32, "q_norm": 4, "k_norm": 4, "selection_bias": 3, "shared_gate": 8}
    small |= {"output_bias": 8, "sinks": 4, "router_bias": 3}
    dense = {"dense_gate": (5, 8), "dense_up": (5, 8), "dense_down": (8, 5)}
    optional = {name: floats(size) for name, size in small.items()} | {name: bits(size) for name, size in dense.items()}
    blocks = [dataclasses.replace(block, **optional) for block in blocks]
    frequencies = np.ones(2, np.float32)
    good = {
        "token_embd": table,
        "blocks": blocks,
        "output_norm": output_norm,
        "output": output,
        "variant": variant,
        "frequencies": frequencies,
        "epsilon": EPSILON,
        "experts_used": 2,
        "window": None,
    }
    compiled = kernels.CompiledDecodeStep(**good)
    parts = kernels.BlockParts(kernels.Routing(groups=3, groups_used=2), halves=4)
    kernels.CompiledDecodeStep(**good | {"parts": parts})
    wrong = {
        "token_embd": [table[:5], table.astype(np.float64)],
        "blocks": [[]],
        "output_norm": [output_norm[:3], output_norm.astype(np.float64)],
        "output": [output[0], output[:, :5], output.T],
        "frequencies": [frequencies[:0], np.ones(3, np.float32), frequencies.astype(np.float64)],
        "experts_used": [0, 4],
        "window": [0],
        "parts": [
            kernels.BlockParts(halves=3),
            kernels.BlockParts(halves=6),
            kernels.BlockParts(kernels.Routing(groups=2)),
            kernels.BlockParts(kernels.Routing(groups=3, groups_used=4)),
        ],
    }
    wrong["blocks"] += [[dataclasses.replace(blocks[0], gate=None, dense_gate=None), blocks[1]]]
    other = {"attn_q": kernels.KernelVariant(variant.tier, "q8_0", "q8")}
    wrong["blocks"] += [[blocks[0], dataclasses.replace(blocks[1], variants=other)]]
    for name in (field.name for field in dataclasses.fields(kernels.BlockWeights) if field.name != "variants"):
        array = getattr(blocks[1], name)
        if isinstance(array, kernels.ExpertMatrices):
            stack = array.memory
            spoiled = None, *map(kernels.ExpertMatrices.of, (stack[..., :1].copy(), stack[:1], stack.astype(np.int16)))
        else:
            unordered = np.asfortranarray(array) if array.ndim > 1 else array[::2]
            spoiled = array[..., :1], array.astype(np.int32), unordered
        wrong["blocks"] += [[blocks[0], dataclasses.replace(blocks[1], **{name: bad})] for bad in spoiled]
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError):
                kernels.CompiledDecodeStep(**good | {name: value})

    def pool(layers=2, memories=2, groups=2, per_block=5, head_dim=4, kind=np.uint16):
        return np.zeros((3, layers, memories, groups, per_block, head_dim), kind)

    one, two = np.array([1]), np.array([2, 0])
    compiled.step([1, 10], pool(), [one, two], [4, 5])
    fixed = pool()
    fixed.flags.writeable = False
    for tokens, blocks, tables, positions in (
        ([], pool(), [], []),
        ([1], pool(), [one], [0, 1]),
        ([1], pool(), [one, two], [0]),
        ([1], pool(), [one], [5]),
        ([1], pool(), [one], [-1]),
        ([11], pool(), [one], [0]),
        ([-1], pool(), [one], [0]),
        ([1], pool(layers=1), [one], [0]),
        ([1], pool(memories=1), [one], [0]),
        ([1], pool(groups=1), [one], [0]),
        ([1], pool(head_dim=6), [one], [0]),
        ([1], pool(kind=np.float64), [one], [0]),
        ([1], pool(kind=np.float16), [one], [0]),
        ([1], pool()[0], [one], [0]),
        ([1], pool()[::2], [one], [0]),
        ([1], fixed, [one], [0]),
        ([1], pool(), [one + 2], [0]),
        ([1, 1], pool(), [one, one], [0, 1]),
    ):
        with pytest.raises(ValueError):
            compiled.step(tokens, blocks, tables, positions)


def test_decode_gives_the_same_bits_on_any_number_of_threads(engine):
    default_threads, numbers = kernels.thread_count(), random.Random(1)
    tokens = [numbers.randrange(engine.config.vocab_size) for _ in range(6)]
    results = []
    for threads in range(1, default_threads + 1):
        engine.runner.threads = threads
        sequence = engine.runner.sequence()
        results.append(torch.cat([engine.runner.step([(sequence, [token])]).hidden for token in tokens]))
        assert kernels.thread_count() == default_threads
    assert all(torch.equal(result, results[0]) for result in results)

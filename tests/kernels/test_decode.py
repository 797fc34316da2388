"""A step of single tokens in one call: what the calls that it stands for give one by one, bit by bit."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fiddler
from fiddler import kernels
from fiddler.telemetry.expert_counts import counting
from fiddler.telemetry.recorder import Meter
from fiddler.telemetry.timeline import Tracer
from oracles.naive import to_bits
from oracles.synthetic import write_random_mixtral

EPSILON = 1e-5


def weights_of(rng, variant, layers, width, hidden, experts, groups, each, size, vocabulary):
    """Random weights of a small model: blocks, the final norm, output and embeddings."""

    def bits(*shape):
        return to_bits(rng.normal(size=shape) / shape[-1] ** 0.5, variant.weights)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    queries, keys = groups * each * size, groups * size
    blocks = [
        kernels.BlockWeights(
            attn_norm=floats(width),
            attn_q=bits(queries, width),
            attn_k=bits(keys, width),
            attn_v=bits(keys, width),
            attn_output=bits(width, queries),
            ffn_norm=floats(width),
            ffn_gate_inp=floats(experts, width),
            gate=bits(experts, hidden, width),
            up=bits(experts, hidden, width),
            down=bits(experts, width, hidden),
        )
        for _ in range(layers)
    ]
    return blocks, floats(width), bits(vocabulary, width), bits(vocabulary, width)


def one_by_one(blocks, output_norm, output, variant, frequencies, used, window, x, keys, values, positions):
    """The order of operations as the paper has it, each by the kernel that `fiddler.kernels` offers for it."""
    h, size = x, 2 * len(frequencies)
    for layer, block in enumerate(blocks):
        x = kernels.rms_norm(h, block.attn_norm, EPSILON)
        q, k, v = kernels.linears(x, [block.attn_q, block.attn_k, block.attn_v], variant)
        q, k, v = (part.reshape(len(h), -1, size) for part in (q, k, v))
        kept = [of_one[layer] for of_one in keys], [of_one[layer] for of_one in values]
        attended = kernels.attend_each(q, k, v, *kept, positions, frequencies, window)
        h = h + kernels.linear(attended.reshape(len(h), -1), block.attn_output, variant)
        x = kernels.rms_norm(h, block.ffn_norm, EPSILON)
        ids, shares = kernels.route(x, block.ffn_gate_inp, used)
        h = h + kernels.expert_ffn(x, ids, shares, block.gate, block.up, block.down, variant)
    return h, kernels.linear(kernels.rms_norm(h, output_norm, EPSILON), output, variant)


def variant_for(name):
    weights, activations = name.split("-")
    return kernels.KernelVariant(kernels.choose_tier(), weights, activations)


@pytest.mark.parametrize("name", ["bf16-bf16", "bf16-f32", "f16-f32"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_step_is_its_parts(name, data):
    variant = variant_for(name)
    layers, groups, each, pairs, experts = (data.draw(st.integers(1, most)) for most in (3, 3, 3, 8, 5))
    width, hidden, tokens = (data.draw(st.integers(1, most)) for most in (70, 90, 18))
    used, window = data.draw(st.integers(1, experts)), data.draw(st.one_of(st.none(), st.integers(1, 12)))
    rng, vocabulary = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), 9
    blocks, output_norm, output, embeddings = weights_of(
        rng, variant, layers, width, hidden, experts, groups, each, 2 * pairs, vocabulary
    )
    frequencies = (1 / 10000 ** (np.arange(pairs) / pairs)).astype(np.float32)
    capacities = [data.draw(st.integers(1, 20)) for _ in range(tokens)]
    positions = [data.draw(st.integers(0, capacity - 1)) for capacity in capacities]
    kind = np.float16 if variant.activations == "bf16" else np.float32

    def random_kept():
        made = [rng.normal(size=(layers, groups, capacity, 2 * pairs)).astype(kind) for capacity in capacities]
        return [half.view(np.uint16) if kind == np.float16 else half for half in made]

    keys, values = random_kept(), random_kept()
    before = [half.copy() for half in keys], [half.copy() for half in values]
    ids = rng.integers(0, vocabulary, tokens).tolist()
    table = embeddings.view(np.float16) if variant.weights == "f16" else embeddings
    x = table[ids].astype(np.float32)
    if variant.weights == "bf16":
        x = (embeddings[ids].astype(np.uint32) << 16).view(np.float32)
    decoder = kernels.CompiledDecodeStep(
        table, blocks, output_norm, output, variant, frequencies, EPSILON, used, window
    )
    kept = [kernels.KVPointers(list(k), list(v)) for k, v in zip(*before, strict=True)]
    h, logits, _ = decoder.step(ids, kept, positions)
    expected = one_by_one(blocks, output_norm, output, variant, frequencies, used, window, x, keys, values, positions)
    np.testing.assert_array_equal(h, expected[0])
    np.testing.assert_array_equal(logits, expected[1])
    for ours, theirs in zip((*before[0], *before[1]), (*keys, *values), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("decode") / "tiny.gguf")


@pytest.fixture(params=["fast", "exact"])
def engine(path, request):
    return fiddler.load(path, device="cpu", precision=request.param)


def steps(runner, rows):
    """Hidden states and logits of some steps of single tokens after prompts of different lengths."""
    sequences, made = [runner.sequence() for _ in range(rows)], []
    for n, sequence in enumerate(sequences):
        runner.prefill(sequence, list(range(3, 5 + 7 * n)))
    for token in range(4):
        hidden = runner.step([(sequence, [10 * n + token]) for n, sequence in enumerate(sequences)])
        made += [hidden, runner.logits(hidden)]
    assert [sequence.length for sequence in sequences] == [2 + 7 * n + 4 for n in range(rows)]
    return made


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_a_step_is_the_models(engine, rows, monkeypatch):
    at_once = steps(engine.runner, rows)
    monkeypatch.setattr(engine.runner, "_decoder", None)
    for ours, theirs in zip(at_once, steps(engine.runner, rows), strict=True):
        assert torch.equal(ours, theirs)


def test_logits_are_those_of_what_is_asked_for(engine):
    runner = engine.runner
    one, other = runner.sequence(), runner.sequence()
    first = runner.step([(one, [5])])
    expected = runner.logits(first)
    second = runner.step([(other, [9])])
    assert not torch.equal(runner.logits(second), expected)
    assert torch.equal(runner.logits(first), expected)  # an older step's
    third = runner.step([(other, [7])])
    given = runner.logits(third)
    again = given.clone()
    given.zero_()
    assert torch.equal(runner.logits(third), again)


def test_a_sequence_stands_once_in_a_step(engine):
    sequence = engine.runner.sequence()
    with pytest.raises(AssertionError, match="twice"):
        engine.runner.step([(sequence, [5]), (sequence, [6])])
    assert sequence.length == 0


def test_several_threads_have_their_own_results(engine):
    """They queue for the kernels, and switch as often as Python lets them."""
    runner = engine.runner

    def many(rows):
        sequences = [runner.sequence() for _ in range(rows)]
        made = []
        for token in range(40):
            hidden = runner.step([(sequence, [token + n]) for n, sequence in enumerate(sequences)])
            made += [hidden, runner.logits(hidden)]
        return made

    expected, before = {rows: many(rows) for rows in (1, 9)}, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for rows, made in zip((1, 9, 1, 9), pool.map(many, (1, 9, 1, 9)), strict=True):
                assert all(map(torch.equal, made, expected[rows]))
    finally:
        sys.setswitchinterval(before)


def test_who_counts_experts_sees_every_token(engine):
    with counting(engine.runner.model) as counted:
        sequence = engine.runner.sequence()
        for token in range(5):
            engine.runner.step([(sequence, [token])])
    used, layers = engine.config.expert_used_count, engine.config.block_count
    assert [sum(of_layer) for of_layer in counted.counts] == [5 * used] * layers


def test_what_is_read_is_recorded(path, monkeypatch):
    """As where each product is called by itself; and the times lie in the step."""
    meter = Tracer()
    runner = fiddler.load(path, device="cpu", recorder=meter).runner
    sequences = [runner.sequence() for _ in range(3)]
    parts = [(sequence, [n + 5]) for n, sequence in enumerate(sequences)]
    began = time.perf_counter()
    runner.step(parts)
    ended = time.perf_counter()
    read, spans = dict(meter.nbytes), [(span.begun, span.ended) for span in meter.spans()]
    assert all(a < b for a, b in spans)
    assert sorted(spans) == spans
    assert began <= spans[0][0] <= spans[-1][1] <= ended
    assert set(meter.seconds) == {"dense", "experts"}
    meter.clear()
    monkeypatch.setattr(runner, "_decoder", None)
    for sequence in sequences:
        sequence.truncate(0)
    runner.logits(runner.step(parts))
    assert dict(meter.nbytes) == read
    assert isinstance(meter, Meter)


def test_bad_arguments_stop_at_the_door():
    rng, variant = np.random.default_rng(0), variant_for("bf16-bf16")
    blocks, output_norm, output, table = weights_of(rng, variant, 2, 8, 6, 3, 2, 2, 4, 11)
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
    decoder = kernels.CompiledDecodeStep(**good)
    wrong = {
        "token_embd": [table[:5], table.astype(np.float64)],
        "blocks": [[]],
        "output_norm": [output_norm[:3], output_norm.astype(np.float64)],
        "output": [output[0], output[:, :5], output.T],
        "frequencies": [frequencies[:0], np.ones(3, np.float32), frequencies.astype(np.float64)],
        "experts_used": [0, 4],
        "window": [0],
    }
    for name in (field.name for field in dataclasses.fields(kernels.BlockWeights)):
        array = getattr(blocks[1], name)
        spoiled = array[..., :1], array.astype(np.int32), np.asfortranarray(array) if array.ndim > 1 else array[::2]
        wrong["blocks"] += [[blocks[0], dataclasses.replace(blocks[1], **{name: each})] for each in spoiled]
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError):
                kernels.CompiledDecodeStep(**good | {name: value})

    def kept(layers=2, groups=2, capacity=5, size=4, kind=np.uint16):
        half = np.zeros((layers, groups, capacity, size), kind)
        return kernels.KVPointers(list(half), list(half.copy()))

    decoder.step([1, 10], [kept(), kept(capacity=1)], [4, 0])
    for tokens, all_kept, positions in (
        ([], [], []),
        ([1], [kept()], [0, 1]),
        ([1], [kept(), kept()], [0]),
        ([1], [kept()], [5]),
        ([1], [kept()], [-1]),
        ([11], [kept()], [0]),
        ([-1], [kept()], [0]),
        ([1], [kept(layers=1)], [0]),
        ([1], [kept(groups=1)], [0]),
        ([1], [kept(size=6)], [0]),
        ([1, 1], [kept(), kept(kind=np.float32)], [0, 0]),
        ([1, 1], [kept()] * 2, [0, 1]),
    ):
        with pytest.raises(ValueError):
            decoder.step(tokens, all_kept, positions)
    array, fixed = np.zeros((2, 5, 4), np.uint16), np.zeros((2, 5, 4), np.uint16)
    fixed.flags.writeable = False
    for keys, values in (
        ([], []),
        ([array], [array, array]),
        ([array], [array[:, :4]]),
        ([array[0]], [array[0]]),
        ([array.astype(np.float64)], [array.astype(np.float64)]),
        ([array], [array.view(np.float16)]),
        ([array[:, ::2]], [array[:, ::2]]),
        ([array], [fixed]),
    ):
        with pytest.raises(ValueError):
            kernels.KVPointers(keys, values)


def test_results_are_the_same_for_any_number_of_threads(engine):
    most, numbers = kernels.thread_count(), random.Random(1)
    tokens = [numbers.randrange(engine.config.vocab_size) for _ in range(6)]
    made = []
    for threads in range(1, most + 1):
        engine.runner.threads = threads
        sequence = engine.runner.sequence()
        made.append(torch.cat([engine.runner.step([(sequence, [token])]) for token in tokens]))
        assert kernels.thread_count() == most
    assert all(torch.equal(each, made[0]) for each in made)

"""The engine on a small random model: results that must agree, and options that are refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling, kernels
from fiddler.errors import RequestError, ResourceError
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
CONTEXT = 620
IDS = np.random.default_rng(3).integers(3, 512, 600).tolist()
TOLERANCE = {"exact": 1e-5, "fast": 1.5e-2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("engine") / "tiny.gguf", context=CONTEXT)


@pytest.fixture(scope="module")
def engine(path):
    return fiddler.load(path)


@pytest.fixture(scope="module")
def exact(path):
    return fiddler.load(path, precision="exact")


@pytest.fixture(params=["exact", "fast"])
def precision(request):
    return request.param


@pytest.fixture
def any_engine(precision, engine, exact):
    return {"fast": engine, "exact": exact}[precision]


def assert_close(actual, expected, precision="exact"):
    """Each row of logits equal within the rounding of `precision`, relative to its size.

    Rounded activations may tip a nearly undecided router: with "fast" one row in ten may differ.
    """
    assert actual.shape == expected.shape
    errors = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten().sort().values
    excluded = errors.numel() // 10 if precision == "fast" else 0
    assert errors[-1 - excluded] <= TOLERANCE[precision]


def step_by_step(engine, sequence, ids, size):
    """Logits after each of `ids`, computed `size` tokens a step."""
    parts = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    return torch.cat([engine.runner.step([(sequence, part)]).logits for part in parts])


def test_cached_decode_gives_the_logits_of_a_full_rescore(any_engine, precision):
    ids = IDS[:24]
    one_by_one = step_by_step(any_engine, any_engine.runner.sequence(), ids, 1)
    assert_close(one_by_one, any_engine.logits(ids), precision)
    for end in (1, 2, 9, 24):
        assert_close(one_by_one[end - 1], any_engine.logits(ids[:end])[-1], precision)


@pytest.mark.parametrize("size", [5, 16, 37])
def test_chunked_prefill_gives_the_logits_of_the_whole(any_engine, precision, size):
    ids = IDS[:75]
    assert_close(step_by_step(any_engine, any_engine.runner.sequence(), ids, size), any_engine.logits(ids), precision)


def test_a_kv_cache_that_grows_loses_nothing(exact):
    """256 positions at first, doubled when full, at last the context: earlier keys and values stay."""
    ids, sequence, runner = IDS[:530], exact.runner.sequence(), exact.runner
    runner.prefill(sequence, ids[:250])
    grown = step_by_step(exact, sequence, ids[250:260], 1)  # over 256
    runner.step([(sequence, ids[260:505])])
    again = step_by_step(exact, sequence, ids[505:530], 5)  # over 512
    whole = exact.logits(ids)  # 512 and then the rest
    assert_close(grown, whole[250:260])
    assert_close(again, whole[505:530])
    assert sequence.length == 530


def test_a_truncated_sequence_forgets_its_later_tokens(exact):
    sequence, runner = exact.runner.sequence(), exact.runner
    runner.prefill(sequence, IDS[:40])
    sequence.truncate(11)
    assert sequence.length == 11
    after = step_by_step(exact, sequence, IDS[100:120], 20)
    assert_close(after, exact.logits(IDS[:11] + IDS[100:120])[11:])
    sequence.truncate(0)
    assert_close(step_by_step(exact, sequence, IDS[:9], 3), exact.logits(IDS[:9]))


def test_sequences_in_one_step_give_the_logits_of_each_alone(any_engine, precision):
    runner = any_engine.runner
    texts = [IDS[:7], IDS[200:231], IDS[400:401]]
    sequences = [runner.sequence() for _ in texts]
    together = runner.step(list(zip(sequences, texts, strict=True))).logits
    for rows, ids in zip(together.split([len(ids) for ids in texts]), texts, strict=True):
        assert_close(rows, any_engine.logits(ids), precision)
    next_ids = [[5], IDS[50:53], [6, 7]]  # one token or several, at different positions, in another order
    order = [2, 0, 1]
    again = runner.step([(sequences[i], next_ids[i]) for i in order]).logits
    for rows, i in zip(again.split([len(next_ids[i]) for i in order]), order, strict=True):
        assert_close(rows, any_engine.logits(texts[i] + next_ids[i])[len(texts[i]) :], precision)


def test_a_sequence_does_not_depend_on_its_neighbour_in_a_step(exact):
    """The same tokens beside two different neighbours."""
    runner = exact.runner
    first, second = (
        runner.step([(runner.sequence(), neighbour), (runner.sequence(), IDS[:6])]).logits[-6:]
        for neighbour in (IDS[300:310], IDS[310:320])
    )
    assert_close(first, second)


def test_a_later_token_does_not_change_earlier_logits(any_engine, precision):
    one, other = any_engine.logits(IDS[:20]), any_engine.logits([*IDS[:19], IDS[20]])
    assert_close(one[:19], other[:19], precision)
    assert (one[19] - other[19]).norm() > 0.1 * one[19].norm()


def test_logits_depend_on_the_position_of_a_token(exact):
    """The same token at two positions has different logits: rotary embeddings are applied."""
    logits = exact.logits([1, 7, 9, 7, 9, 7])
    assert (logits[1] - logits[5]).norm() > 0.1 * logits[1].norm()


def test_fast_is_exact_within_the_rounding_of_its_activations(engine, exact):
    fast, full = engine.logits(IDS[:50]), exact.logits(IDS[:50])
    assert ((fast - full).norm(dim=-1) / full.norm(dim=-1)).median() <= TOLERANCE["fast"]


def test_logits_are_finite_float32_on_the_cpu_and_may_be_of_no_token(engine):
    assert engine.logits([]).shape == (0, 512)
    logits = engine.logits(ids := [1, 2, 3])
    assert logits.shape == (len(ids), 512)
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    assert torch.isfinite(logits).all()
    assert torch.equal(engine.logits(np.array([1, 2, 3])), logits)


@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_results_do_not_depend_on_the_number_of_threads(threads):
    max_threads = kernels.thread_count()
    if threads > max_threads:
        pytest.skip("one core")
    random = np.random.default_rng(9)

    def bits(*shape):
        return (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    x = random.standard_normal((37, 64)).astype(np.float32)
    w, gate, up, down = bits(70, 64), bits(4, 96, 64), bits(4, 96, 64), bits(4, 64, 96)
    ids, weights = random.integers(0, 4, (37, 2)), random.random((37, 2)).astype(np.float32)
    for array in (w, gate, up, down):
        array.flags.writeable = False  # as in a mapping
    variant = kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16")

    def results():
        return kernels.linear(x, w, variant), kernels.expert_ffn(x, ids, weights, gate, up, down, variant)

    try:
        kernels.set_threads(threads)
        outputs = results()
        kernels.set_threads(max_threads)
        assert all(np.array_equal(one, other) for one, other in zip(outputs, results(), strict=True))
    finally:
        kernels.set_threads(max_threads)


def test_greedy_text_does_not_depend_on_the_number_of_threads(path, exact):
    expected = exact.generate("The old fiddler", GREEDY, 12, ignore_eos=True)
    try:
        single_threaded = fiddler.load(path, precision="exact", threads=1)
        assert single_threaded.generate("The old fiddler", GREEDY, 12, ignore_eos=True).tokens == expected.tokens
    finally:
        kernels.set_threads(None)
        torch.set_num_threads(kernels.thread_count())


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"precision": "best"}, RequestError, "precision is 'best'"),
        ({"context": 0}, RequestError, "context is 0"),
        ({"device": "tpu"}, RequestError, "device is 'tpu'"),
        ({"device": "cuda"}, ResourceError, "use --device cpu"),
        ({"gpu_memory": "24GiB"}, ResourceError, "use --device cpu"),
        ({"threads": 0}, RequestError, "0 threads"),
        ({"threads": 10**6}, RequestError, "1000000 threads"),
        ({"kernel": "abacus"}, RequestError, "'abacus' does not run here"),
    ],
)
def test_impossible_load_options_are_refused(path, arguments, kind, message):
    with pytest.raises(kind, match=message):
        fiddler.load(path, **arguments)


def test_the_context_is_the_smaller_of_the_requested_and_the_trained_one(path):
    assert fiddler.load(path, context=100).context == 100
    assert fiddler.load(path, context=10**6).context == CONTEXT
    with pytest.raises(RequestError, match=r"raise --ctx, up to 620"):
        fiddler.load(path, context=100).generate(IDS[:90], GREEDY, 11)


def test_a_text_that_no_context_could_hold_is_refused_before_it_is_encoded(path, monkeypatch):
    engine = fiddler.load(path, context=100)
    limit = 100 * engine.tokenizer.longest_token
    with pytest.raises(RequestError, match="tokens exceed the context of 100"):
        engine.generate("x" * limit, GREEDY)
    monkeypatch.setattr(engine.tokenizer, "encode", None)
    with pytest.raises(RequestError, match=f"{limit + 1} characters, more than {limit}; .* raise --ctx, up to 620"):
        engine.generate("x" * (limit + 1), GREEDY)


def test_a_tied_model_computes_logits_with_its_embeddings(tmp_path):
    tied = fiddler.load(write_random_mixtral(tmp_path / "tied.gguf", tied=True, layers=1), precision="exact")
    hidden = tied.runner.step([(tied.runner.sequence(), IDS[:5])]).hidden
    norm = torch.from_numpy(tied.model_file.bits("output_norm.weight")[0].copy())
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + tied.config.rms_epsilon) * norm
    embedding = torch.from_numpy(tied.model_file.bits("token_embd.weight")[0].copy()).view(torch.bfloat16).float()
    assert_close(tied.logits(IDS[:5]), normed @ embedding.T)


def test_loading_and_generating_do_not_copy_the_weights(tmp_path):
    """A model far larger than the engine's own memory: only the mapping grows with it."""
    small, large = (
        write_random_mixtral(tmp_path / f"{experts}.gguf", layers=2, d=64, f=2048, experts=experts)
        for experts in (2, 64)
    )
    code = (
        "import sys, fiddler; from fiddler.host_memory import peak_memory;"
        "e = fiddler.load(sys.argv[1]); e.generate([1, 2, 3], fiddler.Sampling(0.0), 2); print(peak_memory().anonymous)"
    )
    used = [
        int(subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True).stdout)
        for path in (small, large)
    ]
    assert large.stat().st_size - small.stat().st_size > 90e6
    assert used[1] - used[0] < 20e6

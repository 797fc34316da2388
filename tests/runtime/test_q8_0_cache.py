"""KV caches in Q8_0 on the CPU, against keys and values that the `gguf` package's numpy quantiser rounds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.errors import FiddlerError, RequestError
from fiddler.load_options import LoadOptions
from fiddler.runtime.block_pool import BlockPool
from fiddler.runtime.kv_cache_file import PromptCache
from fiddler.runtime.prefix_cache import PrefixCache
from fiddler.runtime.q8_0_rows import decoded, encoded
from oracles.command import fails_in_one_line, run
from oracles.q8_0_models import IDS, MODELS, latent_model, one_by_one, quantised
from oracles.synthetic import write_random_mixtral

Q8_0 = gguf.GGMLQuantizationType.Q8_0
GREEDY = Sampling(temperature=0.0)


class RoundedPool(BlockPool):
    """float32 keys and values as gguf's Q8_0 rounds them."""

    def store(self, layer, places, memories):
        rounded = []
        for memory in memories:
            rows = np.ascontiguousarray(memory.float().numpy())
            flat = gguf.quantize(rows.reshape(-1, rows.shape[-1]), Q8_0)
            rounded.append(torch.from_numpy(gguf.dequantize(flat, Q8_0).reshape(rows.shape)))
        super().store(layer, places, rounded)


def loaded(path, **options):
    return fiddler.load(path, device="cpu", **{"precision": "exact"} | options)


def rounding(path):
    """The model in torch, with a float32 cache of rounded keys and values."""
    engine = loaded(path)
    runner = engine.runner
    runner.pool = RoundedPool(engine.config, torch.float32, torch.device("cpu"), 64)
    runner.pool.array = None  # as our kernels take it, which would write to it without rounding
    runner.prefix_cache, runner._decoder = PrefixCache(runner.pool, 64), None
    return engine


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("q8") / "tiny.gguf", **MODELS[request.param])


def test_rows_have_the_bytes_and_numbers_that_gguf_computes():
    rows = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    rows[0], rows[1, :32], rows[2, 40] = 0, 1e-7, 1e5
    rows[3, :4] = 127, 0.5, -1.5, 2.5
    rows[4] = np.round(rows[4] * 4) / 4
    expected = gguf.quantize(rows, Q8_0)
    stored = encoded(torch.from_numpy(rows))
    np.testing.assert_array_equal(stored.numpy(), expected)
    np.testing.assert_array_equal(decoded(stored).numpy(), gguf.dequantize(expected, Q8_0))
    again = encoded(decoded(stored))  # a prompt cache file writes them so
    assert torch.equal(decoded(again), decoded(stored))
    assert torch.equal(again[2:], stored[2:]), "but for a block whose scale is 0 as a float16"


def test_a_prompt_and_single_tokens_give_the_logits_of_rounded_keys_and_values(model):
    engine, expected = quantised(model), one_by_one(rounding(model), IDS, 20)
    assert engine.runner._decoder is not None
    actual = one_by_one(engine, IDS, 20)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    exact = one_by_one(loaded(model), IDS, 20)
    assert (actual - exact).abs().max() > 1e-4 * expected.abs().max(), "nothing was rounded"
    fast, fast_exact = (one_by_one(load(model, precision="fast"), IDS, 20) for load in (quantised, loaded))
    own, of_fast = torch.linalg.norm(actual - exact), torch.linalg.norm(fast_exact - exact)
    assert torch.linalg.norm(fast - expected) < 2 * own + of_fast  # both round, to other codes


def test_memory_is_34_bytes_for_32_numbers(model):
    half = loaded(model, cache_type_k="f16", cache_type_v="f16").runner
    assert half.cache_dtype == torch.float16
    assert half.kv_bytes(1000) * 34 == quantised(model).runner.kv_bytes(1000) * 64
    wide = loaded(model, precision="fast", cache_type_k="f32", cache_type_v="f32").runner
    assert wide.kv_bytes(1000) == 2 * half.kv_bytes(1000)


@pytest.mark.parametrize("given", ["f16", "f32"])
def test_the_other_types_may_be_given_too(model, given):
    default = loaded(model, precision={"f16": "fast", "f32": "exact"}[given])
    other = loaded(model, precision={"f16": "exact", "f32": "fast"}[given], cache_type_k=given, cache_type_v=given)
    assert other.runner.cache_dtype == default.runner.cache_dtype
    expected = one_by_one(loaded(model), IDS, 5)
    assert torch.linalg.norm(one_by_one(other, IDS, 5) - expected) < 0.05 * torch.linalg.norm(expected)


def test_sequences_that_share_blocks_and_beams_stay_apart(model):
    engine = quantised(model)
    alone = [engine.generate(IDS[:n], GREEDY, max_tokens=12).tokens for n in (40, 41, 70)]
    engine.runner.forget()
    together = [engine.generate(IDS[:n], GREEDY, max_tokens=12).tokens for n in (70, 41, 40)][::-1]
    assert together == alone
    beams = engine.beam_search(IDS[:30], width=3, max_tokens=8)
    oracle = rounding(model).beam_search(IDS[:30], width=3, max_tokens=8)
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in oracle]


def test_a_prompt_cache_file_gives_back_the_same_blocks(model, tmp_path):
    engine, path = quantised(model), tmp_path / "cache"
    runner = engine.runner
    sequence = runner.sequence()
    runner.step([(sequence, IDS[:50])])
    file = PromptCache(path, engine.model_file, runner.cache_dtype)
    file.write(sequence, IDS[:50])
    assert path.stat().st_size == file.nbytes(50)
    again = runner.sequence()
    PromptCache(path, engine.model_file, runner.cache_dtype).read(again, 50)
    first, second = (runner.pool.array[each.blocks[0].number] for each in (sequence, again))
    np.testing.assert_array_equal(first, second)
    assert first.any()
    with pytest.raises(FiddlerError, match="prompt cache of Q8_0, and this"):
        PromptCache(path, engine.model_file, torch.float32)


@pytest.mark.parametrize("latent", [24, 28])
def test_latent_attention_has_it_too_where_its_vector_is_whole_blocks(tmp_path, latent):
    path = latent_model(tmp_path, latent)
    if latent == 28:
        with pytest.raises(RequestError, match="heads of 36 numbers"):
            quantised(path)
        return
    ids = [each % 500 for each in IDS]
    expected = one_by_one(rounding(path), ids, 5)
    assert (one_by_one(quantised(path), ids, 5) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (one_by_one(loaded(path), ids, 5) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_what_does_not_go_is_one_line_that_names_the_value(tmp_path):
    small = write_random_mixtral(tmp_path / "small.gguf")
    with pytest.raises(RequestError, match=r"cache_type_k q8_0: .*small.gguf has heads of 16 numbers"):
        quantised(small)
    for options, line in (
        ({"cache_type_k": "q8_0"}, "cache_type_k 'q8_0' and cache_type_v None: keys and values have one type"),
        ({"cache_type_k": "q8_0", "cache_type_v": "f16"}, "give both the same"),
        ({"cache_type_k": "q4_0", "cache_type_v": "q4_0"}, "cache_type_k is 'q4_0'; give 'f32', 'f16' or 'q8_0'"),
        ({"cache_type_k": 8, "cache_type_v": 8}, "cache_type_k is 8"),
    ):
        with pytest.raises(RequestError) as caught:
            LoadOptions(**options)
        assert line in str(caught.value)


def test_the_command_takes_llama_cpps_names_of_the_option(tmp_path):
    texts = {
        run("run", "-p", "Once upon a time", "-n", 8, "--temp", 0, "--device", "cpu", *options).stdout
        for options in (("-ctk", "q8_0", "-ctv", "q8_0"), ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0"))
    }
    assert len(texts) == 1
    assert texts.pop().strip()
    small = write_random_mixtral(tmp_path / "small.gguf")
    both = "-ctk", "q8_0", "-ctv", "q8_0"
    fails_in_one_line(run("run", small, "-p", "x", "--device", "cpu", *both), "heads of 16 numbers")
    wrong = run("run", "-p", "x", "-ctk", "q8_0")
    assert wrong.returncode == 2
    assert b"keys and values have one type" in wrong.stderr

"""Long prompts: attention over many positions, chunked prefill against transformers, and memory."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import fiddler
from fiddler.loading import DEMO_MODEL
from fiddler.models import attention
from oracles.reference import from_gguf
from oracles.synthetic import with_context, write_random_mixtral
from tools.measure_memory import measured_prefill

BLOCK = 4096  # past positions in a block of `fiddler.models.attention`


def naive(q, keys, values, window, sinks=None):
    """`attend` in float64: a full mask [queries, keys]; keys and values repeated for every query head."""
    n, heads, head_dim = q.shape
    total, groups = keys.shape[:2]
    k, v = (tensor.double().repeat_interleave(heads // groups, 1) for tensor in (keys, values))
    scores = torch.einsum("nhd,shd->hns", q.double(), k) / head_dim**0.5
    distance = torch.arange(total - n, total)[:, None] - torch.arange(total)
    masked = (distance < 0) | (distance >= (window or total))
    scores = scores.masked_fill(masked, -torch.inf)
    if sinks is not None:  # one more score of each row, which has no value
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, n, -1)], -1)
    return torch.einsum("hns,shd->nhd", scores.softmax(-1)[..., :total], v)


@settings(max_examples=40, deadline=None)
@given(
    n=st.one_of(st.just(1), st.integers(2, 90)),
    past=st.one_of(st.integers(0, 200), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])),
    groups=st.integers(1, 3),
    repeat=st.integers(1, 4),
    half=st.integers(1, 12),
    window=st.one_of(st.none(), st.integers(1, 300)),
    kind=st.sampled_from([torch.float16, torch.float32]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(
    n=64, past=2 * BLOCK + 1, groups=2, repeat=4, half=8, window=None, kind=torch.float16, with_sinks=False, seed=0
)
@example(n=1, past=2 * BLOCK + 1, groups=2, repeat=4, half=8, window=None, kind=torch.float16, with_sinks=False, seed=0)
@example(
    n=64, past=2 * BLOCK + 1, groups=2, repeat=4, half=8, window=BLOCK + 99, kind=torch.float32, with_sinks=True, seed=0
)
def test_attention_in_torch_matches_the_float64_oracle(n, past, groups, repeat, half, window, kind, with_sinks, seed):
    generator = torch.Generator().manual_seed(seed)
    total, head_dim = past + n, 2 * half
    q = 3 * torch.randn(n, groups * repeat, head_dim, generator=generator)
    # laid out as in the KV cache: a head's positions are contiguous, with room after them
    keys, values = (torch.randn(groups, total + 5, head_dim, generator=generator).to(kind) for _ in range(2))
    keys[:, total:] = values[:, total:] = torch.nan
    cached = [half[:, :total].transpose(0, 1) for half in (keys, values)]
    sinks = 3 * torch.randn(groups * repeat, generator=generator) if with_sinks else None
    output = attention.attend(q, *cached, window, sinks)
    assert output.dtype == torch.float32
    # a float32 score of this size is off by 1e-6 or so, and so are the softmax weights
    expected = naive(q, *cached, window, sinks)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)
    if sinks is not None and n > 1:  # as on a GPU without Triton, where scores lie in memory
        whole = attention._attend_masked(q, *cached, window, sinks, whole=True)
        torch.testing.assert_close(whole.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 1000])
def test_chunked_prefill_of_a_long_prompt_gives_the_logits_of_transformers(tmp_path, window):
    """Over more positions than an attention block has; the last token also by itself, as in generation."""
    count = BLOCK + 600
    path = write_random_mixtral(
        tmp_path / "long.gguf", d=32, f=32, heads=2, kv_heads=1, context=count, window=window, seed=5
    )
    engine = fiddler.load(path, context=count, precision="exact")
    generator = random.Random(6)
    ids = [generator.randrange(3, engine.config.vocab_size) for _ in range(count)]
    with torch.inference_mode():
        expected = from_gguf(path)(torch.tensor([ids])).logits[0]
    logits = engine.logits(ids)
    runner, sequence = engine.runner, engine.runner.sequence()
    runner.prefill(sequence, ids[:-1])
    last = runner.step([(sequence, ids[-1:])]).logits
    for actual, expected_rows in ((logits, expected), (last, expected[-1:])):
        errors = (actual - expected_rows).norm(dim=-1) / expected_rows.norm(dim=-1)
        assert float(errors.max()) < 1e-4  # as in test_reference; measured: 1e-5


def test_prefilling_a_long_prompt_takes_little_memory_beyond_its_kv_cache(tmp_path):
    """A full mask of one byte an element would take 38 MB, and logits of all positions 100 MB."""
    tokens = 6144
    model = with_context(DEMO_MODEL, tmp_path / "long.gguf", tokens)
    engine = fiddler.load(model, device="cpu")
    engine.runner.prefill(engine.runner.sequence(), [1] * 16)  # compiles the kernels, unless they are cached
    usage = measured_prefill(model, tokens, "fast")
    assert usage["kv_bytes"] == 8 * 4 * 32 * 2 * 2 * tokens
    assert usage["grown"] - usage["kv_bytes"] < 60e6

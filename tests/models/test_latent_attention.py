"""Multi-head latent attention: both forms of its tensors, its KV cache, and what is refused.

`test_families.py` compares its logits with transformers'.
"""

from __future__ import annotations

import zlib

import pytest
import torch

import fiddler
from fiddler.converters.conversion import convert
from fiddler.errors import FileFormatError
from fiddler.files.model_file import ModelFile
from fiddler.models.architecture import Scoring
from fiddler.models.metadata import read_config
from fiddler.runtime.block_pool import POSITIONS
from oracles.families import CASES, make_family_checkpoint
from oracles.old_latent import in_old_form

NAMES = ("deepseek2, V2, f16, fused, tied", "deepseek2, V3, f16, fused, not renormalised")
IDS = torch.randint(0, 512, (30,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    folder = make_family_checkpoint(CASES[request.param], tmp_path_factory.mktemp("latent") / "checkpoint")
    convert(folder, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


def loaded(path, precision="exact"):
    return fiddler.load(path, precision=precision, device="cpu")


def test_the_form_from_before_2025_gives_the_same_logits(model, tmp_path):
    old = in_old_form(model, tmp_path / "old.gguf")
    assert "blk.0.attn_kv_b.weight" in ModelFile.open(old).file.tensors
    logits, expected = loaded(old).logits(IDS), loaded(model).logits(IDS)
    assert torch.linalg.norm(logits - expected) < 1e-5 * torch.linalg.norm(expected)


def test_the_form_from_before_2025_converts_to_a_file_of_the_same_logits(model, tmp_path):
    old = in_old_form(model, tmp_path / "old.gguf")
    convert(old, tmp_path / "again.gguf")
    torch.testing.assert_close(loaded(tmp_path / "again.gguf").logits(IDS), loaded(old).logits(IDS), rtol=0, atol=0)


def test_selection_biases_make_sigmoids_where_no_key_says_so(header):
    metadata, tensors = header
    assert read_config(metadata, tensors).router.scoring is Scoring.SOFTMAX
    biased = tensors | {f"blk.{layer}.exp_probs_b.bias" for layer in (1, 2)}
    assert read_config(metadata, biased).router.scoring is Scoring.SIGMOID


def test_the_kv_cache_holds_one_vector_a_position_and_layer(model):
    engine = loaded(model)
    config, sequence = engine.config, engine.runner.sequence()
    engine.runner.prefill(sequence, IDS)
    width = config.latent.latent + config.rotated
    stored = [sequence.stored(layer) for layer in range(config.block_count)]
    assert all([memory.shape for memory in layer] == [(len(IDS), 1, width)] for layer in stored)
    positions = len(sequence.blocks) * POSITIONS
    held = positions * width * config.block_count * engine.runner.cache_dtype.itemsize
    assert engine.runner.kv_bytes(len(IDS)) == held


def test_a_prompt_cache_holds_the_latents_once_and_refuses_the_old_form(model, tmp_path):
    engine, path = loaded(model), tmp_path / "cache"
    config, request = engine.config, fiddler.Request(IDS, fiddler.Sampling(temperature=0.0), 4)
    first = engine.start(request, prompt_cache=path)
    text = "".join(first)
    layer = len(IDS) * config.head_dim * 4 + 4  # float32, and a checksum
    assert path.stat().st_size == 64 + 4 + 4 * len(IDS) + 4 + config.block_count * layer
    again = loaded(model).start(request, prompt_cache=path)
    assert "".join(again) == text
    assert again.completion.stats.cached_tokens == len(IDS) - 1
    content = bytearray(path.read_bytes())
    content[8] = 1
    content[64:68] = zlib.crc32(content[:64]).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is a prompt cache of version 1, this is 2; delete it"):
        loaded(model).start(request, prompt_cache=path)


def test_a_copy_and_a_cut_sequence_continue_as_the_whole_one(model):
    engine = loaded(model)
    runner, whole = engine.runner, engine.logits(IDS)
    sequence = runner.sequence()
    runner.prefill(sequence, IDS[:20])
    copy = runner.copy(sequence)
    sequence.truncate(10)
    step = runner.step([(sequence, IDS[10:11]), (copy, IDS[20:25])]).logits
    torch.testing.assert_close(step[0], whole[10], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step[1:], whole[20:25], rtol=1e-4, atol=1e-4)


def test_fast_precision_is_close_to_exact(model):
    exact, fast = loaded(model).logits(IDS), loaded(model, "fast").logits(IDS)
    assert torch.linalg.norm(fast - exact) < 1.5e-2 * torch.linalg.norm(exact)


def test_the_compiled_decode_step_is_skipped(model):
    assert loaded(model).runner._decoder is None


KEY = "deepseek2."


def _without(name):
    return lambda metadata, tensors: [tensors.discard(each) for each in set(tensors) if name in each]


def _with(key, value):
    return lambda metadata, tensors: metadata.__setitem__(KEY + key, value)


HOSTILE = {
    "no latent rank": (
        lambda metadata, tensors: metadata.pop(KEY + "attention.kv_lora_rank"),
        "kv_lora_rank is missing",
    ),
    "a latent of another width": (_with("attention.kv_lora_rank", 30), "key_length is 32; kv_lora_rank"),
    "a latent of no width": (_with("attention.kv_lora_rank", 0), "key_length is 32; kv_lora_rank"),
    "a head of rotated elements only": (_with("attention.key_length_mla", 8), "key_length_mla is 8"),
    "a negative length": (_with("attention.value_length_mla", -1), "value_length_mla is -1"),
    "a length of 2**31": (_with("attention.value_length_mla", 2**31), f"value_length_mla is {2**31}"),
    "a rank as text": (_with("attention.q_lora_rank", "8"), "q_lora_rank is '8'"),
    "queries of one product and of two": (
        lambda metadata, tensors: tensors.add("blk.0.attn_q.weight"),
        "q_lora_rank is ",
    ),
    "no rank of queries": (_with("attention.q_lora_rank", 0), "q_lora_rank is 0"),
    "no heads' matrices": (_without("attn_v_b"), "attn_kv_b, or both of attn_k_b and attn_v_b"),
    "both forms": (lambda metadata, tensors: tensors.add("blk.0.attn_kv_b.weight"), "attn_kv_b, or both"),
    "other KV heads": (_with("attention.head_count_kv", 2), "head_count_kv is 2"),
    "odd rotation": (_with("rope.dimension_count", 7), "dimension_count make 31"),
    "a router unknown": (_with("expert_gating_func", 4), "expert_gating_func is 4"),
    "a scale that is NaN": (_with("expert_weights_scale", float("nan")), "expert_weights_scale is nan"),
    "groups that do not divide": (_with("expert_group_count", 3), "1 of 3 groups"),
    "YaRN by nothing": (
        lambda metadata, tensors: metadata.update(
            {KEY + "rope.scaling.type": "yarn", KEY + "rope.scaling.factor": float("nan")}
        ),
        "rope.scaling.factor is nan",
    ),
    "YaRN from no context": (_with("rope.scaling.original_context_length", 0), "original_context_length is 0"),
    "an infinite multiplier": (_with("rope.scaling.yarn_log_multiplier", float("inf")), "log_multiplier is inf"),
    "a temperature": (_with("attention.temperature_scale", 0.1), "temperature_scale is 0.1"),
}


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Metadata and names of tensors of a V2 with YaRN."""
    folder = make_family_checkpoint(CASES[NAMES[0]], tmp_path_factory.mktemp("hostile") / "checkpoint")
    convert(folder, folder.with_suffix(".gguf"))
    file = ModelFile.open(folder.with_suffix(".gguf")).file
    return dict(file.metadata), set(file.tensors)


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_by_the_value(header, change, message):
    metadata, tensors = dict(header[0]), set(header[1])
    read_config(metadata, tensors)
    change(metadata, tensors)
    with pytest.raises(FileFormatError) as error:
        read_config(metadata, tensors)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

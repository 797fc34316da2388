"""Lines of `convert` about models that llama.cpp computes otherwise than transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fiddler.converters.differences import differences
from fiddler.models import ARCHITECTURES
from fiddler.models.architecture import RouterRule
from fiddler.models.config import Config

PLAIN = Config(ARCHITECTURES["qwen3moe"], 4096, 128, 32, 2, 16, 4, 4, 8, 6, 2, 1e-6, 1e4)
NOT_DIVIDED = RouterRule(renormalise=False)


@pytest.mark.parametrize("name,rule,says", [
    ("qwen3moe", RouterRule(), None),
    ("qwen3moe", NOT_DIVIDED, "always divides the routing weights of Qwen3-MoE"),
    ("qwen2moe", NOT_DIVIDED, None),
    ("qwen2moe", RouterRule(), "never divides the routing weights of Qwen2-MoE"),
    ("olmoe", RouterRule(), "never divides the routing weights of OLMoE"),
    ("granitemoe", RouterRule(), None),
])  # fmt: skip
def test_a_router_that_llama_cpp_does_not_read_from_the_file_is_named(name, rule, says):
    config = replace(PLAIN, architecture=ARCHITECTURES[name], router=rule, expert_shared_feed_forward_length=16)
    lines = list(differences(config))
    assert len(lines) == (says is not None)
    assert says is None or says in lines[0]


def test_an_olmoe_that_llama_cpp_does_not_open_or_does_not_clamp_is_named():
    olmoe = replace(PLAIN, architecture=ARCHITECTURES["olmoe"], router=NOT_DIVIDED)
    assert list(differences(olmoe)) == []
    assert "clip_qkv 2 " in next(differences(replace(olmoe, clamp_kqv=2.0)))
    assert "does not open" in next(differences(replace(olmoe, head_count_kv=2)))

"""The same seed gives the same text: after a restart and with other threads bit by bit, for every family and format.

In `exact`, also with other chunks and beside others, where sums are added in another order: docs/accuracy.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch

import fiddler
from fiddler.kernels.formats import BLOCK_FORMATS
from oracles.deepseek_moe import DeepSeekShape, make_deepseek_checkpoint
from oracles.families import CASES, make_family_checkpoint
from oracles.quantised import write_quantised
from oracles.same_text import outcome, texts
from oracles.synthetic import write_random_mixtral

FAMILIES = (
    *("qwen3moe", "qwen2moe", "olmoe", "granitemoe", "granitemoe, shared, fused", "glm4moe", "dbrx", "gpt-oss, MXFP4"),
    *("deepseek2, V2-Lite", "deepseek2, V3", "mistral, window", "llama, tied, RoPE of Llama 3.1", "deepseek"),
)
FORMATS = ("bf16", "f16", *BLOCK_FORMATS)
THREADS = min(2, int(numba.config.NUMBA_NUM_THREADS))
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=[*FAMILIES, *FORMATS])
def path(request, tmp_path_factory):
    """A model of a family, or a Mixtral of a format."""
    folder, name = tmp_path_factory.mktemp("same"), request.param
    if name in FORMATS:
        dtype = "f16" if name == "f16" else "bf16"
        source = write_random_mixtral(folder / "source.gguf", d=256, f=256, dtype=dtype, seed=4)
        if name == dtype:
            return source
        rule = lambda tensor: None if "norm" in tensor or "gate_inp" in tensor else name  # noqa: E731
        return write_quantised(source, folder / "quantised.gguf", rule)
    if name == "deepseek":
        make_deepseek_checkpoint(DeepSeekShape(), folder / "checkpoint")
    else:
        make_family_checkpoint(CASES[name], folder / "checkpoint")
    fiddler.convert(folder / "checkpoint", folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def other_process():
    """Outcomes of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "oracles.same_text"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=TESTS) as process:

        def ask(*question):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_another_process_with_other_threads_gives_the_same_bits(path, other_process, precision):
    here = outcome(path, precision, 1)
    assert other_process(str(path), precision, THREADS) == here
    assert here["tokens"][0] != here["tokens"][1]


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_logits_of_a_prompt_of_several_chunks_do_not_depend_on_the_number_of_threads(tmp_path, precision):
    path, found = write_random_mixtral(tmp_path / "model.gguf"), []
    for threads in (1, THREADS):
        with fiddler.load(path, device="cpu", precision=precision, threads=threads) as engine:
            ids = [3 + i * i % 90 for i in range(1000)]
            found.append(engine.logits(ids))
    assert torch.equal(*found)


def test_exact_text_is_the_same_in_chunks_of_any_size_and_beside_other_texts(path):
    with fiddler.load(path, device="cpu", precision="exact", threads=1, context=128) as engine:
        alone = texts(engine)
        assert texts(engine, together=True) == alone
        for chunk in (1, 7, 32):
            engine.runner.chunk = chunk
            assert texts(engine) == alone

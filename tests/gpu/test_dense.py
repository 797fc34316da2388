"""A model without experts where the dense part is on a GPU: no orchestrator is made. Only the last tests need one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fiddler
from fiddler.device.memory_budget import GpuStartError
from fiddler.files.model_file import ModelFile
from fiddler.gpu import loader
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.gpu.memory_layout import Layout, lay_out, least_room
from fiddler.gpu.runner import GpuRunner
from fiddler.loading import DEMO_MODEL
from fiddler.models import LLAMA
from fiddler.models.config import Config
from fiddler.telemetry.expert_counts import ExpertCounts
from tools.random_model import write_random_model

CONFIG = Config(LLAMA, 4096, 64, 40, 3, 0, 4, 2, 10, 0, 0, 1e-5, 1e4, feed_forward_length=56,
                leading_dense_block_count=3)  # fmt: skip
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model.gguf"
    write_random_model(path, CONFIG, DEMO_MODEL)
    return path


class OneGraph:
    """Implements `Graphs` of a model without experts: tells which tokens it was handed."""

    breaks = ()

    def __init__(self):
        self.tokens, self.hidden, self.fails = [], torch.zeros(1, 40), False

    def launch(self, token, position, table):
        if self.fails:
            raise ValueError("broken off")
        self.tokens.append((token, position, *table.tolist()))

    def logits(self, ahead=0):
        assert not ahead
        return torch.full((1, 4), float(self.tokens[-1][0]))

    def chosen_at(self, position):
        assert position == self.tokens[-1][1]
        return torch.empty(0, 2, dtype=torch.int64)


def test_steps_without_an_orchestrator_are_those_of_the_cpu(path):
    """The runner of a GPU, with a CPU as its device: prompts, single tokens and several sequences."""
    engine = fiddler.load(path, device="cpu", precision="exact")
    pool = GrowingPool(engine.config, torch.float32, torch.device("cpu"), 3)
    runner = GpuRunner(engine.runner.model, None, 64, torch.float32, 1, 8, pool, SimpleNamespace(total=1 << 40))
    ids = list(range(5, 25))
    expected = engine.logits(ids)
    sequence = runner.sequence()
    torch.testing.assert_close(runner.prefill(sequence, ids[:18]), expected[17])
    for position in (18, 19):
        torch.testing.assert_close(
            runner.step([(sequence, ids[position : position + 1])]).logits[0], expected[position]
        )
    other = runner.sequence()
    together = runner.step([(other, ids[:3]), (sequence, [7])], wanted=[2, 3]).logits
    torch.testing.assert_close(together[0], expected[2])
    assert runner.room(0) == 3 * runner.kv_bytes(1)


def test_single_tokens_are_one_graph_and_an_error_in_it_is_raised():
    counts, graph = ExpertCounts(0, 0), OneGraph()
    decoder = DecodeGraphs(graph, None, counts)
    assert not decoder.uses_cpu
    for position, token in enumerate((3, 1)):
        decoder.step(token, position, np.array([8, position]))
        assert decoder.logits()[0, 0] == token
    assert graph.tokens == [(3, 0, 8, 0), (1, 1, 8, 1)]
    assert counts.counts == []
    graph.fails = True
    with pytest.raises(ValueError, match="broken off"):
        decoder.step(5, 2, np.array([8]))


def test_all_of_the_model_must_fit_and_the_error_names_the_size_that_suffices(path):
    model_file = ModelFile.open(path)
    sizes = loader._sizes(model_file, [], 64, torch.float16, exact=False)
    weights = sum(tensor.nbytes for tensor in model_file.file.tensors.values())
    assert (sizes.experts, sizes.expert, sizes.slots) == (0, 0, 0)
    assert weights < sizes.fixed < weights + (160 << 20)
    assert sizes.token >= 16 * 56
    least = least_room(sizes)
    assert lay_out(least, sizes, 0) == Layout(64, 0, slots=False)
    assert lay_out(least - 1, sizes, 0) is None
    budget = SimpleNamespace(total=100 << 20, room=lambda: 60 << 20)
    with pytest.raises(GpuStartError) as caught:  # where nothing requests the GPU, the CPU computes
        loader._spare(budget, sizes, CONFIG)
    message = str(caught.value)
    assert "a Llama or Mistral has no experts that the CPU could compute" in message
    assert "0.10 GiB are there; --device cpu runs it" in message
    needed = float(message.split("GiB with a context of 64")[0].rpartition(" ")[2])
    assert 0 <= needed - (least + (40 << 20) + (192 << 20)) / 2**30 < 0.011


@GPU
def test_single_tokens_are_decoded_by_a_graph(path):
    engine, reference = (fiddler.load(path, device=device, precision="exact") for device in ("cuda", "cpu"))
    assert engine.runner.orchestrator is None
    assert engine.runner._decoder is not None
    assert ", all on it, " in engine.where
    greedy = fiddler.Sampling(temperature=0.0)
    assert (
        engine.generate("Once upon a time", greedy, 20).tokens
        == reference.generate("Once upon a time", greedy, 20).tokens
    )


@GPU
def test_a_gpu_that_is_too_small_is_an_error_only_where_it_was_requested(tmp_path):
    config = Config(LLAMA, 4096, 1 << 20, 1024, 4, 0, 8, 8, 128, 0, 0, 1e-5, 1e4, feed_forward_length=2048,
                    leading_dense_block_count=4)  # fmt: skip
    write_random_model(tmp_path / "model.gguf", config, DEMO_MODEL)
    with pytest.raises(fiddler.FiddlerError, match="--device cpu runs it"):
        fiddler.load(tmp_path / "model.gguf", device="cuda", gpu_memory="1GiB", context=1 << 20)

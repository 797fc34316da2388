"""Chooses how a GPU runs steps of one token: as captured graphs, or as steps of several tokens. Knows neither."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import Tensor

from fiddler.device import cuda_driver
from fiddler.gpu.runner import GpuRunner
from fiddler.kernels.formats import GPU_FORMATS
from fiddler.kernels.formats.half import BF16, F16
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.offload.token_signals import TokenSignals
from fiddler.telemetry.recorder import Recorder

__all__ = ["can_decode", "decode_with_graphs"]


def can_decode(formats: Collection[WeightFormat]) -> bool:
    """Whether `DecodeGraphs` runs a model whose experts have these formats."""
    return all(each in (BF16, F16) or each.name in GPU_FORMATS for each in formats)


def decode_with_graphs(runner: GpuRunner, cos_sin: Tensor, recorder: Recorder) -> None:
    """Capture the graphs of a decode step, unless experts are missing and the driver cannot wait for the CPU.

    For a GPU on which Triton runs. cos_sin: of every position, see `attention_kernels.rotate_and_store`.
    """
    from fiddler.gpu import attention_kernels
    from fiddler.gpu.decode_graphs import DecodeGraphs
    from fiddler.gpu.graph_capture import CapturedGraphs
    from fiddler.gpu.stream_wait_graphs import StreamWaitGraphs

    experts, decoder = runner.orchestrator, None
    if experts is None or not experts.incomplete or TokenSignals.can_wait():
        with torch.inference_mode():
            stream_waits = os.environ.get("FIDDLER_STREAM_WAITS", "0") != "0" or recorder.wants_queued
            if stream_waits or cuda_driver.ends_long_kernels(runner.pool.device.index or 0):
                make: type[CapturedGraphs] = StreamWaitGraphs
            else:
                make = CapturedGraphs
            graphs = make(runner.model, experts, runner.pool, cos_sin, recorder)
        decoder = DecodeGraphs(graphs, experts, recorder)
    runner.decode_with(decoder, cos_sin, attention_kernels)

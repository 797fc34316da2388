"""`load`: a model file, a device and a backend wired together into an `Engine`."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from fiddler import kernels
from fiddler.cpu.loader import on_cpu
from fiddler.device.detection import wants_gpu
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.engine import Engine
from fiddler.errors import ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import mapped_experts
from fiddler.generation.request import check_options
from fiddler.kernels.precompile import COMPILING
from fiddler.telemetry.expert_counts import read_counts
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["DEMO_MODEL", "load"]

DEMO_MODEL = Path(str(files("fiddler.models"))) / "demo" / "stories-18m.gguf"

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fast", "exact"]
Missing = Literal["auto", "cpu", "stream"]


def load(
    path: str | Path | ModelFile | None = None,
    device: Device = "auto",
    gpu_memory: str | None = None,
    threads: int | None = None,
    context: int = 4096,
    precision: Precision = "fast",
    *,
    kernel: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
    recorder: Recorder = SILENT,
    expert_counts: str | Path | None = None,
    gpu_experts: int | None = None,
    missing: Missing = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    pinned: PinnedMapping | None = None,
) -> Engine:
    """Map a Mixtral GGUF and make it ready to run. Weights stay in the mapping, but for those that go to a GPU.

    path: a .gguf file, any part of a split one, one opened before, or None for the demo model that ships.
    device: "cpu", "cuda", or "auto", which is the GPU where there is one that starts. gpu_memory: the most of it that
    is used, for everything, as "24GiB"; None for nearly all that is free. It holds the dense part, keys and values,
    and as many experts as fit: those chosen most often by expert_counts, a file that `fiddler perplexity` writes.
    gpu_experts: at most so many of them. missing: where experts that are not on the GPU are computed: "auto" does
    what is fastest by measured costs, "cpu" and "stream" leave all to the CPU, or to the GPU.
    progress: is told of the bytes of experts that went to the GPU, and how many will. registration: of the file's
    mapping with the GPU's driver, begun before; None begins it.
    threads: None for every core the process may use. context: positions a sequence can have; the model's own
    limit where that is smaller. precision: "fast" rounds activations to bf16 before products with bf16 weights and
    keeps their keys and values as float16; "exact", and every model of f16 weights, computes in float32.
    kernel: a tier by name; None for what the environment's FIDDLER_KERNEL says, or the best there is. notify: is
    told, in one line, when kernels must be compiled first, which takes seconds. recorder: is told what a step spends
    its time on.
    Raises FiddlerError for anything that cannot be run, in one line.
    """
    started = time.perf_counter()
    check_options(device, precision, missing, context, gpu_experts)
    gpu, why_not = wants_gpu(device, gpu_memory, notify)
    model_file = path if isinstance(path, ModelFile) else ModelFile.open(DEMO_MODEL if path is None else path)
    model_file.check_runnable()
    if gpu and pinned is None:
        pinned = PinnedMapping(model_file.file.mappings, model_file.file.path, model_file.file)
    tokenizer = model_file.tokenizer
    tier, exact, config = kernels.choose_tier(kernel), precision == "exact", model_file.config
    if threads is not None:
        kernels.set_threads(threads)
    experts = mapped_experts(model_file, tier, exact=exact)
    for variant in {layer.variant for layer in experts}:
        kernels.precompile(variant, lambda: notify(COMPILING), decode=pinned is None or not gpu)
    capacity = min(context, config.context_length)
    if pinned is not None and gpu:
        from fiddler.device.memory_budget import GpuStartError
        from fiddler.gpu.loader import on_gpu

        counts = None
        if expert_counts is not None:
            counts = read_counts(Path(expert_counts), config.block_count, config.expert_count)
        try:
            hybrid = on_gpu(
                model_file,
                experts,
                pinned,
                gpu_memory=gpu_memory,
                threads=threads,
                context=capacity,
                exact=exact,
                counts=counts,
                most=gpu_experts,
                missing=missing,
                notify=notify,
                progress=progress,
                recorder=recorder,
            )
        except GpuStartError as error:
            if device == "cuda" or gpu_memory is not None:
                raise
            why_not = f"CPU: {error}"
            notify(f"computing on the CPU: {error}")
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the GPU's memory does not suffice for {gpu_memory or 'all that is free'}; give less --gpu-memory, "
                "or --gpu-experts"
            ) from error
        else:
            notify(hybrid.summary)
            return Engine(model_file, tokenizer, hybrid.runner, "cuda", hybrid.summary, tier.name, started)
    elif expert_counts is not None or gpu_experts is not None or missing != "auto":
        notify("warning: --expert-counts, --gpu-experts and --missing mean nothing without a GPU")
    runner = on_cpu(model_file, experts, kernels.set_threads(threads), capacity, exact, notify, recorder)
    return Engine(model_file, tokenizer, runner, "cpu", why_not, tier.name, started)

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
    device: "cpu", "cuda", or "auto", which is the GPU where there is one that starts. gpu_memory: the limit of its
    memory for everything, as "24GiB"; None for nearly all that is free. It holds the dense weights, the KV cache, and
    as many experts as fit: those chosen most often by expert_counts, a file that `fiddler perplexity` writes.
    gpu_experts: limit of their number. missing: where experts that are not on the GPU are computed: "auto" is
    fastest by measured costs, "cpu" and "stream" leave all to the CPU, or to the GPU.
    progress: called with the bytes of experts copied to the GPU so far, and in all. pinned: the file's mapping, whose
    pinning by the GPU's driver began before; None begins it.
    threads: None for every core the process may use. context: positions a sequence can have; the model's own
    limit where that is smaller. precision: "fast" rounds activations to bf16 before products with bf16 weights and
    stores their KV cache as float16; "exact", and every model of f16 weights, computes in float32.
    kernel: a tier by name; None for that of the environment's FIDDLER_KERNEL, or the best available. notify: called
    with one-line messages, as when kernels must be compiled first, which takes seconds. recorder: receives timing
    events of each step.
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
            loaded = on_gpu(
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
            notify(loaded.summary)
            return Engine(model_file, tokenizer, loaded.runner, "cuda", loaded.summary, tier.name, started)
    elif expert_counts is not None or gpu_experts is not None or missing != "auto":
        notify("warning: --expert-counts, --gpu-experts and --missing mean nothing without a GPU")
    runner = on_cpu(model_file, experts, kernels.set_threads(threads), capacity, exact, notify, recorder)
    return Engine(model_file, tokenizer, runner, "cpu", why_not, tier.name, started)

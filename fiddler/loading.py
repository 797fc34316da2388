"""`load`: a model file, a device and a backend wired together into an `Engine`.

Pinning the file for a GPU and importing torch both take seconds, so the one starts before the other: this module
itself does without torch, and imports the backends once the file is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fiddler.device.pinned_mapping import PinnedMapping, torch_for_gpus
from fiddler.environment import check_environment
from fiddler.errors import RequestError, ResourceError, path_of, quoted
from fiddler.files.model_file import ModelFile
from fiddler.load_options import DEFAULT_CONTEXT, CacheType, Device, LoadOptions, Missing, Precision, parse_size
from fiddler.telemetry.recorder import SILENT, Recorder

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.files.weights import ExpertWeights
    from fiddler.gpu.loader import GpuModel
    from fiddler.kernels import Tier

__all__ = ["DEMO_MODEL", "DEMO_MODELS", "load", "load_engine"]

DEMO_MODELS = {
    name: Path(str(files("fiddler.models"))) / "demo" / f"{name}.gguf" for name in ("stories-18m", "stories-3m")
}
"""The models that ship, by name: a Mixtral of 8 experts, and a Qwen3-MoE of 32 small ones with byte-level BPE."""

DEMO_MODEL = DEMO_MODELS["stories-18m"]
"""What runs where no model is given."""

Notify = Callable[[str], None]
Progress = Callable[[int, int], None]
Importing = Callable[[], AbstractContextManager[None]]


def load(
    path: str | Path | ModelFile | None = None,
    device: Device = "auto",
    gpu_memory: str | int | None = None,
    threads: int | None = None,
    context: int = DEFAULT_CONTEXT,
    precision: Precision = "fast",
    *,
    kernel: str | None = None,
    notify: Notify = lambda text: None,
    recorder: Recorder = SILENT,
    expert_counts: str | Path | None = None,
    gpu_experts: int | None = None,
    missing: Missing = "auto",
    cache_type_k: CacheType | None = None,
    cache_type_v: CacheType | None = None,
    progress: Progress = lambda done, total: None,
) -> Engine:
    """Map a GGUF and make it ready to run. Weights stay in the mapping, but for those that go to a GPU.

    path: a .gguf file, any part of a split one, one opened before, or None for the demo model that ships.
    device: "cpu", "cuda", or "auto", which is the GPU where there is one that starts. gpu_memory: the limit of its
    memory for everything, as "24GiB" or in bytes; None for nearly all that is free. It holds the dense weights, the KV
    cache, and as many experts as fit: those chosen most often by expert_counts, a file that `fiddler perplexity`
    writes. gpu_experts: limit of their number. missing: where experts that are not on the GPU are computed: "auto" is
    fastest by measured costs, "cpu" and "stream" leave all to the CPU, or to the GPU.
    progress: called with the bytes of experts copied to the GPU so far, and in all.
    threads: None for every core the process may use. context: positions a sequence can have; the model's own
    limit where that is smaller. precision: "fast" rounds activations to bf16 before products with bf16 weights and
    stores their KV cache as float16; "exact", and every model of f16 weights, computes in float32.
    cache_type_k, cache_type_v: of the KV cache, both the same: "f32", "f16", or "q8_0", half as large as "f16"; None:
    as precision says. Attention computes as precision says, whatever the type.
    kernel: a tier by name; None for that of the environment's FIDDLER_KERNEL, or the best available. notify: called
    with one-line messages, as when kernels must be compiled first, which takes seconds. recorder: receives the
    events of each step: times, and the experts that it chose.
    Raises FiddlerError for anything that cannot be run, in one line.
    """
    options = LoadOptions(
        device=device,
        gpu_memory=parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory,
        gpu_experts=gpu_experts,
        missing=missing,
        expert_counts=None if expert_counts is None else path_of("expert_counts", expert_counts),
        threads=threads,
        context=context,
        precision=precision,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
    )
    return load_engine(path, options, kernel=kernel, notify=notify, recorder=recorder, progress=progress)


def load_engine(
    path: str | Path | ModelFile | None,
    options: LoadOptions,
    *,
    kernel: str | None = None,
    notify: Notify = lambda text: None,
    recorder: Recorder = SILENT,
    progress: Progress = lambda done, total: None,
    importing: Importing = nullcontext,
) -> Engine:
    """`load` with its options as one value. Other arguments and errors: see there.

    importing: makes a context in which torch and Numba are imported.
    """
    check_environment()
    if not isinstance(kernel, str | None) or len(kernel or "") > 60:
        raise RequestError(f"kernel is {quoted(kernel)}; give the name of a tier, as 'avx2'")
    model_file = _opened(path, importing)
    requested, options = options, _on_cpu_only(model_file, options, notify)
    pinned = _pin(model_file) if options.device != "cpu" and torch_for_gpus() else None
    tokenizer = model_file.tokenizer
    with importing():
        from fiddler import kernels
        from fiddler.cpu.loader import on_cpu
        from fiddler.device.detection import wants_gpu
        from fiddler.engine import Engine
        from fiddler.files.weights import mapped_experts
        from fiddler.kernels.fit_tuning import fit_unknown_cpu
        from fiddler.telemetry.expert_counts import read_counts

    started, config, counts = time.perf_counter(), model_file.config, None
    has_experts = config.architecture.has_experts
    if options.expert_counts is not None and has_experts:  # without a GPU no effect, but they must be what they should
        counts = read_counts(options.expert_counts, len(config.sparse_layers), config.expert_count)
    gpu, why_not = wants_gpu(options.device, options.gpu_memory, notify)
    if options != requested:
        why_not = f"CPU: {model_file.gpu_obstacle}"
    tier = kernels.choose_tier(kernel)
    if options.threads is not None:
        kernels.set_threads(options.threads)
    fit_unknown_cpu(notify)
    experts = mapped_experts(model_file, tier, exact=options.exact)
    if options.of_gpu_only and not has_experts:
        notify("warning: --expert-counts, --gpu-experts and --missing mean nothing: the model has no experts")
    if gpu:
        kernels.precompile({variant for layer in experts for variant in layer.variants}, notify)
        pinned = pinned or _pin(model_file)
        loaded = _on_gpu(model_file, experts, tier, pinned, options, counts, notify, progress, recorder)
        if not isinstance(loaded, str):
            notify(loaded.summary)
            return Engine(model_file, tokenizer, loaded.runner, "cuda", loaded.summary, tier.name, started)
        why_not = f"CPU: {loaded}"
        notify(f"computing on the CPU: {loaded}")
    elif options.of_gpu_only and has_experts:
        notify("warning: --expert-counts, --gpu-experts and --missing mean nothing without a GPU")
    threads, capacity = kernels.set_threads(options.threads), options.capacity(config.context_length)
    runner = on_cpu(model_file, experts, tier, threads, capacity, options, notify, recorder)
    return Engine(model_file, tokenizer, runner, "cpu", why_not, tier.name, started)


def _opened(path: str | Path | ModelFile | None, importing: Importing) -> ModelFile:
    """The file of a model that runs; errors: see `load`."""
    if not isinstance(path, str | Path | ModelFile | None):
        raise RequestError(f"the model is {quoted(path)}; give the path of a .gguf file")
    if not isinstance(path, ModelFile):
        path = ModelFile.open(DEMO_MODEL if path is None else path_of("the model", path))
    with importing():
        path.check_runnable()
    return path


def _on_cpu_only(model_file: ModelFile, options: LoadOptions, notify: Notify) -> LoadOptions:
    """The options, with "cpu" in place of "auto" for a model that no GPU runs; `notify` says so where there is one."""
    obstacle = model_file.gpu_obstacle
    if obstacle is None or options.device == "cpu":
        return options
    if options.needs_gpu:
        raise RequestError(f"{model_file.file.shown_path}: {obstacle}; use --device cpu, without --gpu-memory")
    if torch_for_gpus():
        from fiddler.device.detection import has_nvidia_gpu  # late: imports torch

        if has_nvidia_gpu():
            notify(f"computing on the CPU: {obstacle}")
    return replace(options, device="cpu")


def _on_gpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    tier: Tier,
    pinned: PinnedMapping,
    options: LoadOptions,
    counts: list[list[int]] | None,
    notify: Notify,
    progress: Progress,
    recorder: Recorder,
) -> GpuModel | str:
    """The model on the GPU; or the reason why the CPU must compute, where no option requests the GPU."""
    import torch

    from fiddler.device.memory_budget import GpuStartError
    from fiddler.gpu.loader import on_gpu

    try:
        return on_gpu(model_file, experts, tier, pinned, options, counts, notify, progress, recorder)
    except GpuStartError as error:
        if options.needs_gpu:
            raise
        return str(error)
    except torch.OutOfMemoryError as error:
        limit = "all that is free" if options.gpu_memory is None else f"{options.gpu_memory / 2**30:.2f} GiB"
        remedy = "less --gpu-memory, or --gpu-experts" if experts else "less --ctx, or --device cpu"
        raise ResourceError(f"the GPU's memory does not suffice for {limit}; give {remedy}") from error


def _pin(model_file: ModelFile) -> PinnedMapping:
    """Start pinning the file in a thread."""
    return PinnedMapping(model_file.file.mappings, model_file.file.path, model_file.file)

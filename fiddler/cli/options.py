"""Shared by the commands: options, loading a model by them, lists of numbers, messages. Knows no single command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never

import typer

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.files.model_file import ModelFile

__all__ = [
    "Ctx",
    "DType",
    "Device",
    "DeviceOption",
    "ExpertCounts",
    "GpuExperts",
    "GpuMemory",
    "Missing",
    "MissingOption",
    "ModelOrDemo",
    "Output",
    "Precision",
    "PrecisionOption",
    "Threads",
    "loaded",
    "loading_bar",
    "numbers",
    "say",
]


class DType(StrEnum):
    """--dtype of `convert`."""

    bf16 = "bf16"
    f16 = "f16"


class Device(StrEnum):
    """--device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Missing(StrEnum):
    """--missing."""

    auto = "auto"
    cpu = "cpu"
    stream = "stream"


class Output(StrEnum):
    """-o of `bench`."""

    md = "md"
    json = "json"


class Precision(StrEnum):
    """--precision."""

    fast = "fast"
    exact = "exact"


ModelOrDemo = Annotated[Path | None, typer.Argument(metavar="MODEL.gguf", help="Model; the demo model if not given.")]
DeviceOption = Annotated[Device, typer.Option(envvar="FIDDLER_DEVICE", help="Where to compute.")]
GpuMemory = Annotated[str | None, typer.Option(help="Total GPU memory to use, e.g. 24GiB.")]
GpuExperts = Annotated[int | None, typer.Option(min=0, help="Maximum number of experts on the GPU.")]
MissingOption = Annotated[
    Missing,
    typer.Option(help="Experts that are not on the GPU: compute on the cpu, stream to the GPU, or auto: the fastest."),
]
ExpertCounts = Annotated[
    Path | None, typer.Option(help="File of expert frequencies: the most frequent experts go to the GPU.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; all cores if not given.")]
Ctx = Annotated[
    int | None, typer.Option("-c", "--ctx", min=1, help="Context size in tokens; 4096, or less if the model has less.")
]
PrecisionOption = Annotated[Precision, typer.Option(help="fast: 16-bit activations with bf16 weights; exact: float32.")]


def loaded(model: Path | ModelFile | None, ctx: int | None, **options: Any) -> Engine:
    """The engine for MODEL.gguf or the demo model; `options` are those of `fiddler.load`. Reports to stderr.

    Raises FiddlerError for a bad file before it imports torch.
    """
    model_file, pinned = model, None
    if model_file is not None:
        from fiddler.device.pinned_mapping import PinnedMapping, torch_for_gpus
        from fiddler.files.model_file import ModelFile

        if isinstance(model_file, Path):
            model_file = ModelFile.open(model_file)
        model_file.check_runnable()
        if options.get("device") != "cpu" and torch_for_gpus():
            pinned = PinnedMapping(model_file.file.mappings, model_file.file.path, model_file.file)
        _ = model_file.tokenizer
    from fiddler.loading import load

    with loading_bar() as progress:
        engine = load(
            model_file,
            context=4096 if ctx is None else ctx,
            notify=say,
            progress=progress,
            pinned=pinned,
            **options,
        )
    if ctx is not None and ctx > engine.context:
        say(f"warning: the context is {engine.context}, all that the model was trained with, not {ctx}")
    return engine


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of an option like 1,2,8-12. Raises BadParameter (usage error) for anything else."""
    values: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise typer.BadParameter(f"{option} {text}: give numbers, as 128 or 128,512")
        values += range(int(first), int(last) + 1) if dash else [int(first)]
    return values


def say(text: str) -> None:
    """Print progress, statistics, warnings or errors to stderr: stdout is for results."""
    print(text, file=sys.stderr)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress callback for `load`, (bytes done, bytes in total): a bar on terminals, from the first experts on."""
    from tqdm import tqdm

    bars: list[tqdm[Never]] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None))
            bars[0].set_description("experts to the GPU")
        bars[0].update(done - bars[0].n)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()

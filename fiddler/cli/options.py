"""What the commands of the command line share: options, loading a model by them, lists of numbers, saying something."""

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


ModelOrDemo = Annotated[Path | None, typer.Argument(metavar="MODEL.gguf", help="Model; the demo model if none.")]
DeviceOption = Annotated[Device, typer.Option(envvar="FIDDLER_DEVICE", help="Where to compute.")]
GpuMemory = Annotated[str | None, typer.Option(help="GPU memory to use in all, e.g. 24GiB.")]
GpuExperts = Annotated[int | None, typer.Option(min=0, help="At most so many experts on the GPU.")]
MissingOption = Annotated[
    Missing, typer.Option(help="Who computes experts that are not on the GPU; auto: what is fastest.")
]
ExpertCounts = Annotated[
    Path | None, typer.Option(help="How often each expert is chosen: the most popular go to the GPU.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; all cores if not given.")]
Ctx = Annotated[
    int | None, typer.Option("-c", "--ctx", min=1, help="Positions of context [default: 4096, or the model's].")
]
PrecisionOption = Annotated[Precision, typer.Option(help="fast: 16-bit activations with bf16 weights; exact: float32.")]


def loaded(model: Path | ModelFile | None, ctx: int | None, **options: Any) -> Engine:
    """The engine for MODEL.gguf, or the demo model, by the options of `fiddler.load`; it tells on stderr what it does.

    A bad file is refused before torch is imported.
    """
    opened, pinned = model, None
    if opened is not None:
        from fiddler.device.pinned_mapping import PinnedMapping, torch_for_gpus
        from fiddler.files.model_file import ModelFile

        if isinstance(opened, Path):
            opened = ModelFile.open(opened)
        opened.check_runnable()
        if options.get("device") != "cpu" and torch_for_gpus():
            pinned = PinnedMapping(opened.file.mappings, opened.file.path, opened.file)
        _ = opened.tokenizer
    from fiddler.loading import load

    with loading_bar() as progress:
        engine = load(
            opened,
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
    """Whole numbers of an option like 1,2,8-12. Raises BadParameter, wrong usage, for anything else."""
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise typer.BadParameter(f"{option} {text}: give numbers, as 128 or 128,512")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def say(text: str) -> None:
    """Progress, statistics, warnings and errors: to stderr, which is not what was asked for."""
    print(text, file=sys.stderr)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """What `load` tells its progress to: a bar on terminals, shown from the first experts on."""
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

"""Shared by the commands: options, loading a model by them, messages. Knows no single command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Never

import typer

from fiddler.cli.checked_numbers import check_threads, size
from fiddler.cli.collector import CollectorPause
from fiddler.cli.habits import hub_name
from fiddler.cli.option_groups import OptionGroup
from fiddler.errors import RequestError
from fiddler.load_options import LoadOptions
from fiddler.telemetry.recorder import SILENT, Recorder

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.files.atomic_file import OutputFile
    from fiddler.files.model_file import ModelFile

__all__ = [
    "LOADING",
    "DType",
    "ModelOrDemo",
    "Output",
    "check_local",
    "exit_where_a_file_is_cut_short",
    "loaded",
    "loading_bar",
    "one_line",
    "open_output",
    "opened",
    "say",
    "shown",
]


_LONGEST = 4500  # of an error's line [characters]: a path may have 4095

DType = Literal["bf16", "f16"]
Output = Literal["md", "json"]

# `readable=False`, here and at every path: typer would refuse it in a box of several lines; we do in one.
ModelOrDemo = Annotated[
    Path | None, typer.Argument(metavar="MODEL.gguf", readable=False, help="Model; the demo model if not given.")
]

LOADING = OptionGroup(
    LoadOptions,
    {
        "device": typer.Option(envvar="FIDDLER_DEVICE", help="Where to compute."),
        "gpu_memory": typer.Option(parser=size, metavar="SIZE", help="Total GPU memory to use, e.g. 24GiB."),
        "gpu_experts": typer.Option(
            rich_help_panel="More placement", min=0, help="Maximum number of experts on the GPU."
        ),
        "missing": typer.Option(
            rich_help_panel="More placement",
            help="Experts that are not on the GPU: compute on the cpu, stream to the GPU, or auto: the fastest.",
        ),
        "expert_counts": typer.Option(
            rich_help_panel="More placement",
            readable=False,
            help="File of expert frequencies: the most frequent experts go to the GPU.",
        ),
        "threads": typer.Option(
            "-t", "--threads", min=1, callback=check_threads, help="CPU threads; all cores if not given."
        ),
        "context": typer.Option(
            "-c", "--ctx", min=1, help="Context size in tokens; 4096, or less if the model has less."
        ),
        "precision": typer.Option(help="fast: 16-bit activations with bf16 weights; exact: float32."),
        "cache_type_k": typer.Option(
            "-ctk", "--cache-type-k", help="Type of keys in the KV cache; f16 if not given, f32 with exact."
        ),
        "cache_type_v": typer.Option("-ctv", "--cache-type-v", help="The same of values: the same type."),
    },
)
"""Options of loading a model."""


def check_local(path: Path) -> None:
    """Raise RequestError for a name on the Hugging Face hub that is no path here: it says how to download it."""
    remedy = hub_name(str(path))
    if remedy is not None and not path.exists():
        raise RequestError(f"{path} does not exist; {remedy}")


def loaded(model: Path | ModelFile | None, options: LoadOptions, recorder: Recorder = SILENT) -> Engine:
    """The engine for MODEL.gguf or the demo model. Reports to stderr.

    recorder: receives the events of each step.

    Raises FiddlerError for a bad file before it imports torch.
    """
    from fiddler.loading import load_engine

    model_file = opened(model)
    with loading_bar() as progress:
        engine = load_engine(
            model_file, options, notify=say, progress=progress, recorder=recorder, importing=CollectorPause
        )
    if options.context is not None and options.context > engine.context:
        say(f"warning: the context is {engine.context}, all that the model was trained with, not {options.context}")
    return engine


def opened(model: Path | ModelFile | None) -> ModelFile:
    """The file of MODEL.gguf or the demo model; from now on the process ends in one line where it is cut short.

    Raises FiddlerError for a bad file before it imports Numba.
    """
    if isinstance(model, Path):
        check_local(model)
    from fiddler.files.model_file import ModelFile
    from fiddler.loading import DEMO_MODEL

    file = model if isinstance(model, ModelFile) else ModelFile.open(DEMO_MODEL if model is None else model)
    exit_where_a_file_is_cut_short()
    return file


def exit_where_a_file_is_cut_short() -> None:
    """From now on a mapped file that is cut short ends the process in one line."""
    from fiddler.files.bus_error import exit_on_bus_error
    from fiddler.files.mapped_files import ROWS, table_address

    exit_on_bus_error(table_address(), ROWS)


def open_output(path: Path | None) -> AbstractContextManager[OutputFile | None]:
    """The file that a command writes at its end, opened before its work; None if `path` is. See `whole_file`."""
    if path is None:
        return nullcontext()
    from fiddler.files.atomic_file import whole_file

    return whole_file(path, force=True)


def say(text: str) -> None:
    """Print progress, statistics, warnings or errors to stderr, printable: stdout is for results."""
    print(shown(text), file=sys.stderr)


def shown(text: str) -> str:
    r"""`text` with everything but printable characters, line breaks and tabs written out, as `\x1b`.

    Names of files and texts of models may hold any character, and a terminal would obey some.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`text` as one printable line; of a longer one than any path the two ends: errors repeat what was typed."""
    line = shown(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:300]} ... {line[-300:]}"


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

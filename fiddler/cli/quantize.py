"""`fiddler convert` and `fiddler quantize`: a model as another GGUF. Knows arguments and a progress bar; no weights."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from fiddler.cli.interrupts import leave_at_once
from fiddler.cli.options import DType, check_local, exit_where_a_file_is_cut_short, say, shown

__all__ = ["convert", "quantize"]

_TYPE = "Quantised type, by llama-quantize's name: Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, MXFP4_MOE, ..."

_Imatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        readable=False,
        help="Importance matrix, as llama-imatrix writes it: rounding spares the weights that matter most.",
    ),
]


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", readable=False, help="Folder of a Hugging Face checkpoint, or a GGUF."),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.gguf", readable=False, help="File to write; beside SOURCE if not given."),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="16-bit type of the weights; the checkpoint's if not given.")
    ] = None,
    quantised: Annotated[str | None, typer.Option("--type", help=f"{_TYPE} In place of --dtype.")] = None,
    imatrix: _Imatrix = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf.")] = False,
) -> None:
    """Convert a Hugging Face folder, or a float32 or old GGUF, to a GGUF in 16 bits or quantised."""
    check_local(source)
    _run(source, _beside(source) if target is None else target, dtype, force, quantisation=quantised, imatrix=imatrix)


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", readable=False, help="Model in 16 or 32 bits.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", readable=False, help="File to write.")],
    quantised: Annotated[str, typer.Option("--type", help=_TYPE)],
    imatrix: _Imatrix = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf.")] = False,
) -> None:
    """Quantise a GGUF: smaller and faster, at some loss of quality; every core encodes."""
    check_local(source)
    _run(source, target, None, force, quantisation=quantised, imatrix=imatrix)


def _run(
    source: Path, target: Path, dtype: Any, force: bool, *, quantisation: str | None, imatrix: Path | None
) -> None:
    from tqdm import tqdm

    if source.is_file():  # a GGUF: its header is mapped
        exit_where_a_file_is_cut_short()
    from fiddler.converters import convert as run_conversion
    from fiddler.files.inspection import size_text

    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a half-written file must be removed
    shown_name = shown(target.name)
    with tqdm(unit="B", unit_scale=True, desc=shown_name, leave=False, disable=None) as bar:  # on terminals only

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = run_conversion(
            source, target, dtype, quantisation=quantisation, imatrix=imatrix, force=force, progress=progress
        )
    for warning in report.warnings:
        say(f"warning: {warning}")
    say(
        f"{report.path}: {report.tensors} tensors, {size_text(report.nbytes)} in {report.seconds:.1f} s "
        f"({report.nbytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s)"
    )


def _beside(source: Path) -> Path:
    """NAME.gguf beside the folder NAME. Raises BadParameter (usage error) where SOURCE is a file."""
    if source.is_file():
        raise typer.BadParameter(f"{source} is a file: name OUT.gguf, the file to write, too")
    folder = source.resolve()
    return folder.with_name(f"{folder.name}.gguf")

"""The command `calibrate`: measures this machine's links and kernels, or shows what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fiddler.cli.options import Device, Precision, say
from fiddler.errors import RequestError

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL.gguf]", help="Whose experts; none: Mixtral-8x7B's shape.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what is stored, measure nothing.")] = False,
    device: Annotated[Device, typer.Option(envvar="FIDDLER_DEVICE", help="cpu: leave the GPU out.")] = Device.auto,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; none: the best number.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="fast or exact, as for run.")] = Precision.fast,
) -> None:
    """Measure what an expert costs on the CPU, over the link and on the GPU; `run` does it when it first needs to."""
    if show and model is not None:
        raise typer.BadParameter("--show prints everything that is stored; leave out MODEL.gguf")
    from fiddler.offload.calibration import cache_folder, stored

    if show:
        found = stored()
        if not found:
            raise RequestError(f"{cache_folder()}: no calibration is stored yet; `fiddler calibrate` makes one")
        for calibration in found:
            print(calibration.to_text())
        return
    opened = None
    if model is not None:
        from fiddler.files.model_file import ModelFile

        opened = ModelFile.open(model)
        opened.check_runnable()
    from fiddler.offload.cost_benchmark import calibrate_alone

    print(calibrate_alone(opened, device.value, threads, exact=precision is Precision.exact, notify=say).to_text())

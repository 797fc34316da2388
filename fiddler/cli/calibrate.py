"""The command `calibrate`: measures this machine's PCIe link and kernels, or prints the stored calibrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, say
from fiddler.errors import RequestError
from fiddler.load_options import LoadOptions

__all__ = ["calibrate"]


_LOADING = LOADING.only("device", "threads", "precision").with_help(
    device="cpu: leave the GPU out.",
    threads="CPU threads; the fastest number if not given.",
    precision="fast or exact, as for run.",
)


@with_options(_LOADING)
def calibrate(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL.gguf]", help="Model for the experts' shape; Mixtral-8x7B's if not given."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the stored calibrations; measure nothing.")] = False,
    *,
    loading: LoadOptions,
) -> None:
    """Measure an expert's cost on the CPU, over the PCIe link and on the GPU; `run` does so when it first needs it."""
    if show and model is not None:
        raise typer.BadParameter("--show prints everything that is stored; leave out MODEL.gguf")
    from fiddler.offload.calibration import cache_folder, stored

    if show:
        calibrations = stored()
        if not calibrations:
            raise RequestError(f"{cache_folder()}: no calibration is stored yet; `fiddler calibrate` makes one")
        for calibration in calibrations:
            print(calibration.to_text())
        return
    model_file = None
    if model is not None:
        from fiddler.files.model_file import ModelFile

        model_file = ModelFile.open(model)
        model_file.check_runnable()
    from fiddler.offload.cost_benchmark import calibrate_alone

    result = calibrate_alone(model_file, loading.device, loading.threads, exact=loading.exact, notify=say)
    print(result.to_text())

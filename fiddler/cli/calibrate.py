"""The command `calibrate`: measures this machine's PCIe link and kernels, or prints what is stored of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, opened, say
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
        typer.Argument(
            metavar="[MODEL.gguf]", readable=False, help="Model for the experts' shape; Mixtral-8x7B's if not given."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the stored calibrations; measure nothing.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Choose the kernels' settings that are fastest on this CPU; nothing else.")
    ] = False,
    *,
    loading: LoadOptions,
) -> None:
    """Measure an expert's cost on the CPU, over the PCIe link and on the GPU; `run` does so when it first needs it."""
    if (show or kernels) and model is not None:
        raise typer.BadParameter("--show and --kernels are about this machine; leave out MODEL.gguf")
    if show and kernels:
        raise typer.BadParameter("--show measures nothing; leave out --kernels")
    if show:
        _show()
        return
    if kernels:
        _fit_kernels(loading.threads)
        return
    model_file = None if model is None else opened(model)
    if model_file is not None:
        model_file.check_runnable()
    from fiddler.offload.cost_benchmark import calibrate_alone

    result = calibrate_alone(model_file, loading.device, loading.threads, exact=loading.exact, notify=say)
    print(result.to_text())


def _show() -> None:
    from fiddler.kernels.machine.tuning import current_tuning, tuning_source
    from fiddler.offload.calibration import cache_folder, stored

    print(f"kernel settings: {current_tuning().name} ({_SOURCES[tuning_source()]})")
    calibrations = stored()
    if not calibrations:
        say(f"{cache_folder()}: no calibration is stored yet; `fiddler calibrate` makes one")
    for calibration in calibrations:
        print(calibration.to_text())


def _fit_kernels(threads: int | None) -> None:
    from fiddler.kernels.fit_tuning import fit_tuning
    from fiddler.kernels.machine.tuning import tuning_source

    say("comparing kernel settings: up to a minute, most of it for compiling")
    print(fit_tuning(threads).to_text())
    if tuning_source() == "FIDDLER_TUNING":
        say("warning: FIDDLER_TUNING is set and goes before the stored settings")


_SOURCES = {
    "FIDDLER_TUNING": "from FIDDLER_TUNING",
    "fitted": "fitted on this CPU",
    "table": "the table's for this CPU",
    "default": "the default for an unknown CPU, until the first start",
}

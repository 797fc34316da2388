"""The command line: parses, calls one function, prints. Nothing outside the `cli` files prints, nothing else exits.

Text that was asked for goes to stdout; progress, statistics and warnings to stderr. Exit codes: 0 done, 1 an error
in one line, 2 wrong usage, 130 interrupted. Heavy imports are inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fiddler.cli_bench import bench
from fiddler.cli_calibrate import calibrate
from fiddler.cli_options import Device, DType, Missing, Precision, loading_bar, say
from fiddler.errors import FiddlerError, RequestError

if TYPE_CHECKING:
    from fiddler.completion import Stats

__all__ = ["app", "convert", "inspect", "main", "run"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Mixture-of-Experts language models larger than the GPU, unquantised.",
)


app.command()(bench)
app.command()(calibrate)


def main() -> NoReturn:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)
    try:
        _check_stdout()
        app(standalone_mode=True)
    except FiddlerError as error:
        _fail(error, str(error))
    except KeyboardInterrupt:  # from `convert`, cleaned up
        _leave(130)
    except BrokenPipeError:  # the reader of stdout has gone: nothing is left to say
        _silence_stdout()
        _leave(1)
    except OSError as error:  # the rooms turn what they expect into a FiddlerError; a full disk under stdout is left
        _silence_stdout()
        _fail(error, ": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError as error:
        _fail(error, "out of memory; close other programs or lower --ctx")
    except Exception as error:
        _fail(error, f"internal: {type(error).__name__}: {error} (set FIDDLER_TRACEBACK=1 and report this)")
    _leave(0)


def _version(value: bool) -> None:
    if value:
        from fiddler import __version__

        print(f"fiddler {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder of a Hugging Face checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    dtype: Annotated[DType | None, typer.Option(help="16-bit type of the weights [default: the checkpoint's].")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf.")] = False,
) -> None:
    """Convert a Hugging Face Mixtral folder to GGUF."""
    from tqdm import tqdm

    from fiddler.converters import convert as run_conversion

    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a half-written file must be removed
    with tqdm(unit="B", unit_scale=True, desc=target.name, leave=False, disable=None) as bar:  # on terminals only

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = run_conversion(source, target, dtype.value if dtype else None, force=force, progress=progress)
    for warning in report.warnings:
        say(f"warning: {warning}")
    say(
        f"{report.path}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB in {report.seconds:.1f} s "
        f"({report.nbytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s)"
    )


@app.command()
def run(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL.gguf", help="Model; the demo model if none.")] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    count: Annotated[
        int, typer.Option("-n", "--n-predict", min=-1, help="Tokens to generate; -1: until the end or --ctx.")
    ] = -1,
    temp: Annotated[float, typer.Option(help="Temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 or less: all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep the fewest tokens that reach this probability; 1: all.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Keep tokens this probable, relative to the first; 0: all.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option(help="Penalty on tokens seen lately; 1: none.")] = 1.0,
    repeat_last_n: Annotated[int, typer.Option(min=-1, help="How many tokens are lately; -1: all.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never choose an end token.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory to stderr.")] = False,
    seed: Annotated[int, typer.Option(min=-1, help="Seed of the sampling; -1: a new one each time.")] = -1,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    gpu_memory: Annotated[str | None, typer.Option(help="GPU memory to use in all, e.g. 24GiB.")] = None,
    gpu_experts: Annotated[int | None, typer.Option(min=0, help="At most so many experts on the GPU.")] = None,
    missing: Annotated[
        Missing, typer.Option(help="Who computes experts that are not on the GPU; auto: what is fastest.")
    ] = Missing.auto,
    expert_counts: Annotated[
        Path | None, typer.Option(help="How often each expert is chosen: the most popular go to the GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; all cores if not given.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option("-c", "--ctx", min=1, help="Positions of context [default: 4096, or the model's].")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="fast: 16-bit activations with bf16 weights; exact: float32.")
    ] = Precision.fast,
) -> None:
    """Continue a text. Without MODEL.gguf: the small demo model that ships with fiddler."""
    text = _prompt_text(prompt, prompt_file)
    from fiddler.sampling import Sampling

    try:
        sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, None if seed < 0 else seed)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    opened = None
    if model is not None:
        from fiddler.model_file import ModelFile

        opened = ModelFile.open(model)  # a bad file is refused here, before torch is imported
        opened.check_runnable()
        _ = opened.tokenizer
    from fiddler.engine import load

    wanted = 4096 if ctx is None else ctx
    with loading_bar() as progress:
        engine = load(
            opened,
            device.value,
            gpu_memory,
            threads,
            wanted,
            precision.value,
            notify=say,
            expert_counts=expert_counts,
            gpu_experts=gpu_experts,
            missing=missing.value,
            progress=progress,
        )
    if ctx is not None and ctx > engine.context:
        say(f"warning: the context is {engine.context}, all that the model was trained with, not {ctx}")
    generation = engine.start(text, sampling, None if count < 0 else count, stop=stop or (), ignore_eos=ignore_eos)
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stats:
        say(f"{engine.where} | {_stats_text(generation.completion.stats)}")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="Model to look at.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's architecture, sizes, tensors and tokenizer, without reading tensor data."""
    from fiddler.description import describe, to_text

    description = describe(model)
    from fiddler.kernels import available_tiers, choose_tier

    tiers = [tier.name for tier in available_tiers()]
    description["kernels"] = {"runs": choose_tier().name, "available": tiers}
    if as_json:
        import json

        print(json.dumps(description, indent=2))
    else:
        print(to_text(description))


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from -p, a file or standard input; wrong usage where there is none or more than one.

    As with llama.cpp one newline at the end of a file is not part of it: `echo` and editors put it there. Bytes that
    are no UTF-8 reach the tokenizer as they are.
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give -p or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            given = prompt_file.read_bytes()
        except OSError as error:
            raise FiddlerError(f"{prompt_file}: cannot be read: {error.strerror}") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give -p TEXT, --prompt-file FILE, or a text on standard input")
    else:
        given = sys.stdin.buffer.read()
    return given.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def _stats_text(stats: Stats) -> str:
    return (
        f"load {stats.load_seconds:.2f} s | "
        f"prompt {stats.prompt_tokens} tokens, {stats.prompt_speed:.1f} tokens/s | "
        f"generation {stats.generated_tokens} tokens, {stats.generation_speed:.1f} tokens/s | "
        f"peak memory {stats.peak_resident / 2**20:.0f} MiB with the mapped file, "
        f"{stats.anonymous / 2**20:.0f} MiB of its own"
    )


def _fail(error: BaseException, message: str) -> NoReturn:
    if os.environ.get("FIDDLER_TRACEBACK") == "1":
        raise error
    say("error: " + " ".join(message.split()))
    _leave(1)


def _check_stdout() -> None:
    if not isinstance(sys.stdout, io.TextIOWrapper):
        raise FiddlerError("standard output is closed; give it a terminal, a pipe or a file")
    sys.stdout.reconfigure(errors="replace")  # where its encoding lacks a character, as in some locales


def _silence_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    """What SIGINT does. Raised as an exception in the middle of an import of torch it would abort the process."""
    os._exit(130)


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)

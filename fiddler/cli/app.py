"""The command line: parses, calls one function, prints. Only the `cli` files print and exit. Knows no model.

Results go to stdout; progress, statistics and warnings to stderr. Exit codes: 0 success, 1 an error in one line,
2 usage error, 130 interrupted. The module of a command is imported when the command is called, and heavy libraries
inside its function: `--help` stays quick.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from fiddler.cli.collector import CollectorPause
from fiddler.cli.command import Command, Group
from fiddler.cli.interrupts import exit_on_interrupt
from fiddler.cli.options import one_line, say
from fiddler.cli.standard_streams import open_closed
from fiddler.environment import check_environment
from fiddler.errors import FiddlerError

__all__ = ["COMMANDS", "command_line", "main"]

COMMANDS = {
    "run": "fiddler.cli.run",
    "serve": "fiddler.cli.serve",
    "batch": "fiddler.cli.batch",
    "bench": "fiddler.cli.bench",
    "calibrate": "fiddler.cli.calibrate",
    "perplexity": "fiddler.cli.perplexity",
    "convert": "fiddler.cli.quantize",
    "quantize": "fiddler.cli.quantize",
    "inspect": "fiddler.cli.inspect",
}
"""The commands, in the order of --help, and the module that has the function of that name."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command_line(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands, names of `COMMANDS`; imports their modules.

    A command behaves alike beside the others and alone; the program's own --help and errors need all of them.
    """
    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # square brackets in help texts are no markup
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Run Mixture-of-Experts language models larger than the GPU, unquantised.",
    )
    app.callback()(_options)
    for name in commands:
        app.command(cls=Command)(getattr(import_module(COMMANDS[name]), name))
    return app


def main() -> NoReturn:
    """Run the command line and exit."""
    exit_on_interrupt()
    open_closed()
    try:
        _check_stdout()
        try:
            called = [name for name in sys.argv[1:2] if name in COMMANDS]
            with CollectorPause():
                app = command_line(called or COMMANDS)
            app(standalone_mode=True)
        finally:  # here, not at interpreter exit: a failed flush becomes an error in one line
            sys.stdout.flush()
    except FiddlerError as error:
        _fail(error, str(error))
    except KeyboardInterrupt:  # from a command that has cleaned up
        _leave(130)
    except BrokenPipeError:  # stdout's reader has closed the pipe: nobody is left to print for
        _silence_stdout()
        _leave(1)
    except OSError as error:  # expected ones are FiddlerErrors, but for those of stdout, which no file name comes with
        _silence_stdout()
        if error.errno in _NO_SPACE and not error.filename:
            _fail(error, f"standard output: cannot be written: {error.strerror}; make room, or send it elsewhere")
        _fail(error, ": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError as error:
        _fail(error, "out of memory; close other programs or lower --ctx")
    except Exception as error:
        if package := _not_imported(error):
            remedy = "look at the environment variables that it reads, or install it again"
            _fail(error, f"{package} cannot be imported: {error}; {remedy}")
        _fail(error, f"internal: {type(error).__name__}: {error} (set FIDDLER_TRACEBACK=1 and report this)")
    _leave(0)


def _version(value: bool) -> None:
    if value:
        from fiddler import __version__

        print(f"fiddler {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    check_environment()


def _not_imported(error: BaseException) -> str | None:
    """The package, not ours, that was being imported when `error` was raised; None if none was."""
    frames = traceback.walk_tb(error.__traceback__)
    names = (frame.f_globals.get("__name__", "") for frame, _ in frames if frame.f_code.co_name == "<module>")
    packages = (name.partition(".")[0] for name in names)
    return next((package for package in packages if package not in ("fiddler", "__main__")), None)


def _fail(error: BaseException, message: str) -> NoReturn:
    if os.environ.get("FIDDLER_TRACEBACK") == "1":
        raise error
    say("error: " + one_line(message))
    _leave(1)


def _check_stdout() -> None:
    if not isinstance(sys.stdout, io.TextIOWrapper):
        raise FiddlerError("standard output is closed; give it a terminal, a pipe or a file")
    sys.stdout.reconfigure(errors="replace")  # some locales' encodings lack characters of the text


def _silence_stdout() -> None:
    """Send buffered output to /dev/null: the interpreter's last flush must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)

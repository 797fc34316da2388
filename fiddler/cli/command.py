"""Commands with a short, grouped --help, that know options typed from habit. Knows no single command.

--help shows the options of a command by groups (`rich_help_panel`), but for those in `RARE`; --help-all shows all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fiddler.cli.arguments import HELP_ALL, Arguments, fail
from fiddler.cli.habits import ALIASES, COMMANDS, REFUSED
from fiddler.cli.options import one_line

__all__ = ["RARE", "Command", "Group"]

RARE = ("Beam search", "More sampling", "More placement")
"""Groups of options that only --help-all shows."""


class Command(TyperCommand):
    """A command whose help is grouped and whose arguments may have the names of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` (click's hook), after names of habit are replaced. Raises a usage error in one line."""
        if ctx.resilient_parsing:  # for completion
            return super().parse_args(ctx, args)
        arguments = Arguments(ctx, self.params, args)
        translated = arguments.translated
        if translated == [HELP_ALL]:
            ctx.meta[HELP_ALL] = True
            translated = ["--help"]
        try:
            rest = super().parse_args(ctx, translated)
        except typer.BadParameter as error:
            if (line := arguments.explained(error)) is None:
                raise
            fail(ctx, line)
        arguments.check_numbers()
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options (click's hook)."""
        everything = bool(ctx.meta.get(HELP_ALL))
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        left_out: list[str] = []
        for param in self.get_params(ctx):
            panel = getattr(param, "rich_help_panel", None) or "Options"
            panel = "Arguments" if param.param_type_name == "argument" else panel
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if panel in RARE and not everything:
                left_out += [] if panel in left_out else [panel]
            else:
                groups.setdefault(panel, []).append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{', '.join(left_out)}: see {ctx.command_path} {HELP_ALL}.")


class Group(TyperGroup):
    """The group of all commands; knows what people type for them elsewhere. Usage errors are one printable line."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the group's own options (click's hook)."""
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest and run the command (click's hook)."""
        with _printable_errors():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` (click's hook). Raises a usage error where an option of a command stands before it."""
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        name = args[0].partition("=")[0] if args else ""
        if name.startswith("-") and name not in known and not ctx.resilient_parsing:
            params = [param for command in self.commands.values() for param in command.params]
            elsewhere = {"-m", "--model", *ALIASES, *REFUSED, *(option for param in params for option in param.opts)}
            if name in elsewhere:
                fail(ctx, f"{name} belongs behind a command, as in: fiddler run MODEL.gguf -p TEXT")
            close = get_close_matches(name, known, 1, 0.75)
            fail(ctx, f"no option {name}; " + (f"did you mean {close[0]}?" if close else "fiddler --help lists them"))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that `args` begin with (click's hook). Raises a usage error that says what to type instead."""
        name = args[0]
        if name not in self.commands and not ctx.resilient_parsing:
            if name.endswith(".gguf"):
                fail(ctx, f"{name} is no command; type: fiddler run {name}")
            bare = name.lower().removesuffix(".exe").removesuffix(".py").replace("_", "-").removeprefix("llama-")
            close = [bare] if bare in COMMANDS else get_close_matches(bare, [*self.commands, *COMMANDS], 1, 0.75)
            instead = COMMANDS.get(close[0], f"did you mean `fiddler {close[0]}`?") if close else ""
            fail(ctx, f"no command {name!r}" + (f": {instead}" if instead else "; fiddler --help lists them"))
        return super().resolve_command(ctx, args)


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Usage errors repeat values, which may be of any length and hold what a terminal would obey."""
    try:
        yield
    except typer.BadParameter as error:
        error.message = one_line(error.message)
        raise

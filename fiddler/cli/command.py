"""Commands with a short, grouped --help, that know options typed from habit. Knows no single command.

--help shows the options of a command by groups (`rich_help_panel`), but for those in `RARE`; --help-all shows all.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from fiddler.cli.habits import ALIASES, COMMANDS, IGNORED, REFUSED

__all__ = ["RARE", "Command", "Group"]

RARE = ("Beam search", "More sampling", "More placement")
"""Groups of options that only --help-all shows."""

_HELP_ALL = "--help-all"


class Command(TyperCommand):
    """A command whose help is grouped and whose arguments may have the names of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` (click's hook), after names of habit are replaced. Raises a usage error for refused ones."""
        return super().parse_args(ctx, list(self._translated(ctx, args)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options (click's hook)."""
        everything = bool(ctx.meta.get(_HELP_ALL))
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
            formatter.write_text(f"{', '.join(left_out)}: see {ctx.command_path} {_HELP_ALL}.")

    def _translated(self, ctx: Any, args: list[str]) -> Iterator[str]:
        options: dict[str, Any] = {
            name: param for param in self.params for name in (*param.opts, *param.secondary_opts)
        }
        positional = [param.name for param in self.params if param.param_type_name == "argument"]
        rest = iter(args)
        for argument in rest:
            if argument == "--":
                yield argument
                yield from rest
                return
            name, equals, value = argument.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if name not in options and name in ALIASES and ALIASES[name] in options:
                name = ALIASES[name]
            if name in options:
                yield name + equals + value
                if not equals and not options[name].is_flag and (following := next(rest, None)) is not None:
                    yield following
            elif name in ("-m", "--model") and "model" in positional:
                if equals or (value := next(rest, "")):
                    yield value
            elif name == "--outfile" and "target" in positional:
                yield value if equals else next(rest, "")
            elif name == _HELP_ALL:
                ctx.meta[_HELP_ALL] = True
                yield "--help"
            elif name in REFUSED:
                _fail(ctx, f"{name}: {REFUSED[name]}")
            elif name not in IGNORED:
                yield argument


class Group(TyperGroup):
    """The group of all commands; knows what people type for them elsewhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` (click's hook). Raises a usage error where an option of a command stands before it."""
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        if args and args[0].startswith("-") and args[0].partition("=")[0] not in known:
            _fail(ctx, f"{args[0]} belongs behind a command, as in: fiddler run MODEL.gguf -p TEXT")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that `args` begin with (click's hook). Raises a usage error that says what to type instead."""
        name = args[0]
        if name not in self.commands and not ctx.resilient_parsing:
            if name.endswith(".gguf"):
                _fail(ctx, f"{name} is no command; type: fiddler run {name}")
            close = get_close_matches(name.lower(), [*self.commands, *COMMANDS], 1)
            instead = COMMANDS.get(name.lower())
            if instead is None and close:
                instead = COMMANDS.get(close[0], f"did you mean `fiddler {close[0]}`?")
            _fail(ctx, f"no command {name!r}" + (f": {instead}" if instead else "; fiddler --help lists them"))
        return super().resolve_command(ctx, args)


class _UsageError(typer.BadParameter):
    """Wrong usage that is no option's value."""

    def format_message(self) -> str:
        """The message by itself (click's hook)."""
        return self.message


def _fail(ctx: Any, message: str) -> NoReturn:
    raise _UsageError(message, ctx)

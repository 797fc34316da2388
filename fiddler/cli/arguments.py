"""Reads a command's arguments before click: names of habit become ours, and wrong usage is one line that helps.

Click's own lines ("Got unexpected extra argument(s)") say what is wrong, not what to type. Knows no single command but
by the tables in `habits`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from fiddler.cli.checked_numbers import is_plain
from fiddler.cli.habits import ALIASES, ARGUMENTS, BARE, IGNORED, REFUSED, VALUES

__all__ = ["HELP_ALL", "Arguments", "fail"]

HELP_ALL = "--help-all"
_HELP = ("--help", "-h")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
_ATTACHED = re.compile(r"(-\w)([\d./].*)", re.DOTALL)  # -n4, -m./model.gguf; -ngl is no -n
_LONGEST = 60  # of a text repeated in a message [characters]


class _UsageError(typer.BadParameter):
    """Wrong usage that is no option's value."""

    def format_message(self) -> str:
        """The message by itself (click's hook)."""
        return self.message


def fail(ctx: Any, message: str) -> NoReturn:
    """Raise a usage error whose line is `message`."""
    raise _UsageError(message, ctx)


class Arguments:
    """What stands behind one command: `translated` for click, or a usage error.

    Raises BadParameter where an option is unknown, refused or lacks its value, or an argument is missing or too many.
    """

    def __init__(self, ctx: Any, params: Sequence[Any], arguments: Sequence[str]) -> None:
        self._ctx = ctx
        self._options: dict[str, Any] = {
            name: param
            for param in params
            if param.param_type_name == "option"
            for name in (*param.opts, *param.secondary_opts)
        }
        self._places: dict[str, Any] = {param.name: param for param in params if param.param_type_name == "argument"}
        self._given: dict[str, tuple[str, str]] = {}  # each option's last value behind its name, by the parameter's
        self._named: dict[str, str] = {}  # arguments that were given as options, as -m MODEL
        self._bare: list[str] = []
        options = list(self._read(arguments))
        if options[-1:] in (["--help"], [HELP_ALL]):
            self.translated = options[-1:]
            return
        self._check_required()
        self.translated = [*options, "--", *self._placed()]

    def check_numbers(self) -> None:
        """Raise a usage error where a number that typer takes is not written in plain digits."""
        for name, (option, value) in self._given.items():
            kind = self._number_type(name)[0]
            if kind and not is_plain(value):
                example = 1000 if kind is int else 0.8
                names = " / ".join(self._options[option].opts)
                fail(self._ctx, f"{names}: {_no_number(kind, value)}; write it in plain digits, as {example}")

    def explained(self, error: typer.BadParameter) -> str | None:
        """A better line for click's refusal of an option's value; None where it has none."""
        name = getattr(error.param, "name", None)
        if not isinstance(name, str) or name not in self._given:
            return None
        option, value = self._given[name]
        if value in self._options:
            return f"{option} needs a value, and {value} is an option; {_sentence(self._options[option])}"
        message = self._wrong_number(name, value) or error.message.removeprefix("Value error, ").removesuffix(".")
        instead = next(
            (
                text
                for (o, v), text in VALUES.items()
                if o in self._options[option].opts and re.fullmatch(v, value, re.I)
            ),
            None,
        )
        names = " / ".join(self._options[option].opts)
        return f"{names}: {message}" + (f"; {instead}" if instead else "")

    def _number_type(self, name: str) -> tuple[type[int] | type[float] | None, OptionInfo | None]:
        """Whether an option is a whole number, a number or neither (None), and its declaration, which has bounds."""
        hint = get_type_hints(self._ctx.command.callback, include_extras=True)[name]
        hint, *declared = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds = get_args(hint) or (hint,)
        kind = int if int in kinds else float if float in kinds else None
        return kind, next((each for each in declared if isinstance(each, OptionInfo)), None)

    def _wrong_number(self, name: str, value: str) -> str | None:
        """Why an option's number is refused, in words that are the same with every release of typer."""
        kind, declared = self._number_type(name)
        if kind is None or (declared and declared.parser):  # a parser has reasons of its own
            return None
        try:
            number = kind(value)
        except ValueError:
            return _no_number(kind, value)
        least, most = (declared.min, declared.max) if declared else (None, None)
        if least is not None and number < least:
            return f"{_quoted(value)} must be greater than or equal to {least}"
        if most is not None and number > most:
            return f"{_quoted(value)} must be less than or equal to {most}"
        return None

    def _read(self, arguments: Sequence[str]) -> Iterator[str]:
        """The options and their values, by our names; what stands for itself goes to `_bare` and `_named`."""
        rest = iter(arguments)
        for argument in rest:
            if argument == "--":
                self._bare += rest
                return
            if argument == "-" or not argument.startswith("-"):
                self._bare.append(argument)
                continue
            name, equals, value = self._split(argument)
            if name in _HELP and not equals:
                yield "--help"
                return
            if name == HELP_ALL:
                yield HELP_ALL
                return
            if name in self._options and self._options[name].is_flag:
                if equals:
                    fail(self._ctx, f"{name} takes no value: type {name} alone, or leave it out")
                yield name
            elif name in self._options:
                value = value if equals else self._value(rest, name, _sentence(self._options[name]))
                self._given[self._options[name].name] = (name, value)
                yield from (name, value)
            elif place := next((place for place in ARGUMENTS.get(name, ()) if place in self._places), None):
                if place in self._named:
                    fail(self._ctx, f"{name} stands there twice; give one {_metavar(self._places[place])}")
                self._named[place] = value if equals else self._value(rest, name, _sentence(self._places[place]))
            elif name not in IGNORED:
                self._unknown(name)

    def _split(self, argument: str) -> tuple[str, str, str]:
        """Name, "=" or nothing, value; the name is ours where it is another program's for the same."""
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name not in self._options and ALIASES.get(name) in self._options:
            name = ALIASES[name]
        attached = _ATTACHED.fullmatch(argument)
        if name not in self._options and attached and attached[1] in self._options:
            return attached[1], "=", attached[2]
        return name, equals, value

    def _value(self, rest: Iterator[str], name: str, sentence: str) -> str:
        value = next(rest, None)
        if value is None:
            fail(self._ctx, f"{name} needs a value; {sentence}")
        return value

    def _unknown(self, name: str) -> NoReturn:
        if self._refusal(name):
            fail(self._ctx, f"{name}: {REFUSED[name]}")
        path = self._ctx.command_path
        line = f"{path} has no option {name}"
        positive = name.replace("--no-", "--", 1)
        if positive != name and positive in self._options:
            fail(self._ctx, f"{line}: {positive} is off where it is not given")
        if name[:2] in BARE.values() and name[:2] in self._options and f"-{name}" not in self._options:
            fail(self._ctx, f"{line}; a value stands by itself: {name[:2]} {_quoted(name[2:])}")
        close = self._close(name)
        if close and close in REFUSED and close not in self._options:
            fail(self._ctx, f"{line}; {close}: {REFUSED[close]}")
        fail(self._ctx, line + (f"; did you mean {close}?" if close else f"; {path} {HELP_ALL} lists them"))

    def _close(self, name: str) -> str | None:
        """The name nearest to an unknown one: an option, or one that is refused with a reason."""
        known = {option: option for option in (*self._options, *_HELP)}
        known |= {other: ours for other, ours in ALIASES.items() if ours in self._options}
        known |= {other: other for other in REFUSED if other not in known and self._refusal(other)}
        if (folded := name.lower()) in known:
            return known[folded]
        if f"-{folded}" in known:  # -prompt
            return known[f"-{folded}"]
        if len(name) < 4:
            return None
        longer = [other for other in known if other.startswith(name)]
        return next((known[other] for other in longer or get_close_matches(folded, known, 1, 0.82)), None)

    def _refusal(self, name: str) -> bool:
        """Whether the reason why an option is refused helps here: it may name options that this command lacks."""
        return name in REFUSED and set(_OPTION.findall(REFUSED[name])) <= self._options.keys() | {"--local-dir"}

    def _check_required(self) -> None:
        for name, option in self._options.items():
            if option.required and option.name not in self._given and name == option.opts[0] and not self._extra():
                fail(self._ctx, f"{name} is missing; {_sentence(option)}")

    def _extra(self) -> list[str]:
        return self._bare[len(self._places.keys() - self._named.keys()) :]

    def _placed(self) -> Iterator[str]:
        """The arguments in their order."""
        if extra := self._extra():
            self._too_many(extra)
        bare = iter(self._bare)
        for name, param in self._places.items():
            value: str | None = self._named[name] if name in self._named else next(bare, None)
            if value is not None:
                yield value
            elif param.required:
                fail(self._ctx, f"{_metavar(param)} is missing; type: {self._usage()}")

    def _too_many(self, extra: list[str]) -> NoReturn:
        line = f"unexpected argument {_quoted(extra[0])}"
        for name, value in self._given.values():
            if value in self._options:
                fail(self._ctx, f"{line}: {name} needs a value, and took {value} for it")
        path, option = self._ctx.command_path, BARE.get(self._ctx.command.name)
        if option is None:
            fail(self._ctx, f"{line}; type: {self._usage()}")
        given = self._given.get(self._options[option].name)
        words = list(self._bare)
        models = [value for value in words if value.endswith(".gguf") and "model" in self._places]
        if option != "-p" or models:
            free = len(self._places) - len(self._named)
            files = models[:free] if models else words[:free]
            words = [value for value in words if value not in files]
        else:
            files = []
        if given is not None and option == "-p":
            text = " ".join([given[1], *words])
            fail(self._ctx, f"{line}; several words need quotes: {option} {_quoted(text, True)}")
        if given is not None:
            fail(self._ctx, f"{line}; type: {self._usage()} {option} {_quoted(given[1])}")
        typed = " ".join([path, *map(_quoted, [*self._named.values(), *files])])
        fail(self._ctx, f"{line}; type: {typed} {option} {_quoted(' '.join(words), True)}")

    def _usage(self) -> str:
        places = [_metavar(param) if param.required else f"[{_metavar(param)}]" for param in self._places.values()]
        return " ".join([self._ctx.command_path, *places])


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper()).strip("[]{}")


def _sentence(param: Any) -> str:
    """An option's help, to stand behind a semicolon."""
    text = (param.help or "").rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _no_number(kind: type[int] | type[float], value: str) -> str:
    return f"{_quoted(value)} is no {'whole number' if kind is int else 'number'}"


def _quoted(text: str, always: bool = False) -> str:
    """`text` as one types it in a shell; a long one is cut."""
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return f'"{text}"' if always and not set(text) & set('"$`\\!') else shlex.quote(text)

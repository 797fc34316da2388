"""Groups of options that several commands share: each option is declared once, and a command receives one value.

    @with_options(LOADING)
    def run(prompt: str, *, loading: LoadOptions) -> None: ...

has --device and all other options of `LOADING`, where `loading` stands among its parameters. Knows no single option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from fiddler.errors import RequestError

__all__ = ["OptionGroup", "with_options"]


@dataclass(frozen=True)
class OptionGroup:
    """Options whose values make a frozen dataclass.

    kind: the dataclass; its fields have the options' types and defaults. options: the declarations, by field, in the
    order of --help; fields without one keep their defaults.
    """

    kind: type[Any]
    options: Mapping[str, OptionInfo]

    def only(self, *names: str) -> OptionGroup:
        """The group for a command that has just these options."""
        return replace(self, options={name: self.options[name] for name in names})

    def without(self, *names: str) -> OptionGroup:
        """The group for a command that lacks these options, or declares its own of that name."""
        return self.only(*(name for name in self.options if name not in names))

    def with_help(self, **texts: str) -> OptionGroup:
        """The group for a command where some options have another meaning. texts: help by field."""
        return replace(self, options={**self.options, **{name: self._explained(name, texts[name]) for name in texts}})

    def parameters(self) -> list[inspect.Parameter]:
        """The options as typer reads them."""
        types = get_type_hints(self.kind)
        defaults = {field.name: field.default for field in fields(self.kind)}
        return [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=Annotated[types[name], option]
            )
            for name, option in self.options.items()
        ]

    def _explained(self, name: str, text: str) -> OptionInfo:
        option = copy(self.options[name])
        option.help = text
        return option


def with_options(*groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: its keyword-only parameters of the groups' dataclasses become the groups' options.

    Raises BadParameter (usage error), when the command is called, where a dataclass refuses its values.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        receivers: dict[str, OptionGroup] = {}
        parameters: list[inspect.Parameter] = []
        signature = inspect.signature(command, eval_str=True)
        for name, parameter in signature.parameters.items():
            group = next((group for group in groups if group.kind is parameter.annotation), None)
            if group is None:
                parameters.append(parameter)
            else:
                receivers[name] = group
                parameters += group.parameters()
        assert len(receivers) == len(groups), f"{command.__name__} does not receive each of its groups"

        @wraps(command)
        def called(**values: Any) -> None:
            for name, group in receivers.items():
                try:
                    values[name] = group.kind(**{option: values.pop(option) for option in group.options})
                except RequestError as error:
                    raise typer.BadParameter(str(error)) from None
            command(**values)

        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate

"""Options that several commands share: declared alike, checked at the door, and received as one value."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from fiddler.cli.app import command_line
from fiddler.cli.beams import BEAMS
from fiddler.cli.option_groups import OptionGroup, with_options
from fiddler.cli.options import LOADING
from fiddler.cli.sampling_options import SAMPLING
from oracles.command import run

SHARED = {name for group in (LOADING, SAMPLING, BEAMS) for name in group.options}

OWN_HELP = {("batch", "seed"), ("serve", "seed"), ("serve", "n_probs")}
OWN_HELP |= {("calibrate", "device"), ("calibrate", "threads"), ("calibrate", "precision")}
"""Options of a group with a meaning of their own in one command."""

OWN = {("bench", "threads"), ("bench", "seed"), ("convert", "dtype")}
"""Options that a command declares itself, although a group has one of that name."""

COMMANDS = {
    "run": SHARED,
    "batch": {*LOADING.options, *SAMPLING.options},
    "serve": {*LOADING.options, *SAMPLING.options},
    "bench": LOADING.options.keys() - {"threads", "context"},
    "perplexity": LOADING.options.keys() - {"context", "expert_counts"},
    "calibrate": {"device", "threads", "precision"},
}


@dataclass(frozen=True)
class Colours:
    sky: str = "blue"
    count: int = 2


def shared_options():
    """Command -> name of parameter -> its declaration, for parameters of the groups."""
    commands = get_command(command_line()).commands
    return {
        command: {
            option.name: option
            for option in commands[command].params
            if option.name in SHARED and (command, option.name) not in OWN
        }
        for command in commands
    }


def test_each_command_has_the_options_of_its_groups():
    found = {command: options.keys() for command, options in shared_options().items() if options}
    assert found == COMMANDS


@pytest.mark.parametrize("name", sorted(SHARED))
def test_a_shared_option_is_the_same_in_every_command(name):
    declarations, helps = set(), defaultdict(set)
    for command, options in shared_options().items():
        if name in options:
            option = options[name]
            limits, panel = (getattr(option, "min", None), getattr(option, "max", None)), option.rich_help_panel
            kind = (option.required, option.is_flag, option.multiple, option.metavar, limits, panel)
            declarations.add((*option.opts, option.default, option.envvar, kind))
            helps[option.help].add(command)
    assert len(declarations) == 1
    own = {command for command, other in OWN_HELP if other == name}
    assert {command for commands in helps.values() if len(commands) == 1 for command in commands} >= own
    assert len([text for text, commands in helps.items() if not commands <= own]) == 1


def test_a_command_receives_its_options_as_one_frozen_value():
    group = OptionGroup(Colours, {"sky": typer.Option(help="The sky."), "count": typer.Option("-c", min=1)})
    received = []
    small = typer.Typer()

    @small.command()
    @with_options(group.with_help(sky="This sky."))
    def paint(first: str, *, colours: Colours, last: bool = False) -> None:
        received.append((first, colours, last))

    runner = CliRunner()
    assert runner.invoke(small, ["a"]).exit_code == 0
    assert runner.invoke(small, ["b", "--sky", "red", "-c", "3", "--last"]).exit_code == 0
    assert received == [("a", Colours(), False), ("b", Colours("red", 3), True)]
    assert runner.invoke(small, ["a", "-c", "0"]).exit_code == 2
    page = runner.invoke(small, ["--help"]).output
    assert "This sky." in page
    assert page.index("--sky") < page.index("--last")  # where the value stands among the parameters


def test_a_group_that_no_parameter_receives_is_refused():
    with pytest.raises(AssertionError, match="does not receive"):
        with_options(LOADING)(lambda: None)


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["bench", "m.gguf"], ["perplexity", "-f", "t"]])
@pytest.mark.parametrize("size", ["8 apples", "0GiB", ""])
def test_a_bad_size_is_refused_before_anything_is_opened(command, size):
    done = run(*command, "--gpu-memory", size, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 2
    assert f"--gpu-memory {size!r}: give a size, as 24GiB" in done.stderr.decode()


def test_gpu_memory_without_a_gpu_is_refused_before_anything_is_opened():
    done = run("run", "never-opened.gguf", "-p", "x", "--gpu-memory", "24GiB", "--device", "cpu")
    assert done.returncode == 2
    assert b"--gpu-memory 24.00 GiB" in done.stderr
    assert b"leave out one" in done.stderr

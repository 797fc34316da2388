"""Options and commands of llama.cpp and Hugging Face: each works, or one line says what it is here."""

import json
import re
import shutil
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from fiddler.cli.app import command_line
from fiddler.cli.habits import ALIASES, COMMANDS, IGNORED, REFUSED, hub_name

TINY = Path(__file__).parents[1] / "data" / "tiny"
COMMAND_LINE = typer.main.get_command(command_line())


def parsed(*arguments):
    """A command's values by option, without running it."""
    name, *rest = arguments
    command = COMMAND_LINE.commands[name]
    with command.make_context(name, rest) as context:
        return context.params


def refusal(*arguments):
    """The one line that a wrong usage prints, after click's two lines on usage."""
    done = CliRunner().invoke(command_line(), list(arguments))
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.stderr.splitlines()[-1] == line
    assert done.stdout == ""
    return line


@pytest.mark.parametrize(
    ("habit", "ours"),
    [
        ("run -m M -p hi -n 4", "run M -p hi -n 4"),
        ("run -p hi --model M", "run -p hi M"),
        ("run -p hi --model=M", "run -p hi M"),
        ("run M -sys brief -p hi", "run M --system brief -p hi"),
        ("run M -f T", "run M --prompt-file T"),
        ("run M --file T", "run M --prompt-file T"),
        ("run M -p hi -s 42", "run M -p hi --seed 42"),
        ("run M -p hi --temperature 0", "run M -p hi --temp 0"),
        ("run M -p hi --max-tokens 4", "run M -p hi -n 4"),
        ("run M -p hi --max_new_tokens=4", "run M -p hi -n 4"),
        ("run M -p hi --predict 4", "run M -p hi -n 4"),
        ("run M -p hi --ctx-size 512", "run M -p hi -c 512"),
        ("run M -p hi -r User:", "run M -p hi --stop User:"),
        ("run M -p hi --reverse-prompt=User:", "run M -p hi --stop User:"),
        ("run M -p hi --jinja --color --no-display-prompt --log-disable", "run M -p hi"),
        ("run M -p hi -st", "run M -p hi --chat"),
        ("run M -p hi -cnv", "run M -p hi --chat"),
        ("run M -p hi --perf", "run M -p hi --stats"),
        ("run M -p hi --grammar-file x", "run M -p hi --grammar x"),
        ("run M -p hi --num_beams 4", "run M -p hi --beams 4"),
        ("bench -m M -p 16 -n 4 -r 1", "bench M -p 16 -n 4 -r 1"),
        ("perplexity -m M -f T -c 128", "perplexity M -f T -c 128"),
        ("inspect -m M", "inspect M"),
        ("convert D --outfile O --outtype bf16", "convert D O --dtype bf16"),
        ("batch I O -m M --temperature 1 -s 3", "batch I O -m M --temp 1 --seed 3"),
        ("serve -m M --jinja -cb --no-webui -to 9 --ctx-size 64", "serve M --no-ui --timeout 9 -c 64"),
        ("serve M --served-model-name x --max_model_len 64", "serve M --alias x -c 64"),
    ],
)
def test_other_names_are_our_options(habit, ours):
    assert parsed(*habit.split()) == parsed(*ours.split())


@pytest.mark.parametrize("text", ["-ngl", "--jinja", "-m", "--temperature"])
def test_the_value_of_an_option_is_never_taken_for_a_habit(text):
    assert parsed("run", "M", "-p", text)["prompt"] == text
    assert parsed("run", f"--prompt={text}")["prompt"] == text
    assert str(parsed("run", "--", text)["model"]) == text  # a Path, but for early releases of typer


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ("run M -p hi -ngl 99", "--gpu-memory 24GiB"),
        ("run M -p hi --n-gpu-layers=99", "--gpu-experts N"),
        ("run M -p hi -no-cnv", "--chat"),
        ("run M -p hi -ctk q5_1", "give q8_0"),
        ("run M -p hi --n-cpu-moe 3", "--gpu-experts N"),
        ("run M -p hi -ot exps=CPU", "--gpu-memory"),
        ("run -hf ggml-org/x -p hi", "hf download"),
        ("run M -p hi -fa", "leave it out"),
        ("bench M -ngl 0", "--device cpu uses no GPU"),
        ("perplexity M -f T --hellaswag", "perplexity"),
        ("-m M -p hi", "fiddler run MODEL.gguf -p TEXT"),
        ("serve M -ngl 99", "--gpu-memory 24GiB"),
        ("serve M --api-key-file k", "FIDDLER_API_KEY="),
        ("serve M --ssl-key-file k", "proxy"),
        ("serve M --embedding", "no embeddings"),
        ("serve M --tensor-parallel-size 2", "one GPU is used"),
        ("serve M --gpu-memory-utilization 0.9", "--gpu-memory 24GiB"),
        ("quantize I O Q4_K_M", 'quantize I O --type "Q4_K_M"'),
        ("quantize I O --type Q4_K_M --pure", "leave it out"),
        ("chat M", "`fiddler run MODEL.gguf`"),
        ("pull mixtral", "hf download"),
        ("RUN", "`fiddler run`"),
        ("runn M", "`fiddler run`"),
        ("mixtral.gguf", "fiddler run mixtral.gguf"),
        ("xyzzy", "fiddler --help"),
    ],
)
def test_what_fiddler_does_in_another_way_is_named_in_one_line(habit, words):
    line = refusal(*habit.split())
    assert words in line
    assert "Invalid value" not in line


def test_every_name_in_the_tables_means_what_it_says():
    """No alias leads nowhere, and no refused or ignored name is an option of the command."""
    options = {
        name: {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        for name, command in COMMAND_LINE.commands.items()
    }
    anywhere = set().union(*options.values())
    assert set(ALIASES.values()) <= anywhere
    assert not set(REFUSED) & set(ALIASES)
    assert not IGNORED & anywhere
    assert not set(COMMANDS) & set(COMMAND_LINE.commands)
    for name, reason in (REFUSED | COMMANDS).items():
        assert "\n" not in reason, name


def test_the_table_for_users_has_every_name_of_ours_and_a_name_of_each_refusal():
    text = (Path(__file__).parents[2] / "docs" / "usage.md").read_text().partition("## Coming from")[2]
    names = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))
    assert names >= ALIASES.keys() | IGNORED
    reasons = {reason: {name for name, other in REFUSED.items() if other == reason} for reason in REFUSED.values()}
    assert [others for others in reasons.values() if not others & names] == []


def test_a_name_on_the_hub_is_told_from_a_path():
    assert "hf download mistralai/Mixtral-8x7B-v0.1 " in hub_name("mistralai/Mixtral-8x7B-v0.1")
    assert [hub_name(text) for text in ("models/a.gguf", "/a/b", "../b", "a/b/c", "a", "a/")] == [None] * 6


def test_help_is_short_and_shows_defaults_and_the_rest_with_help_all():
    def lines(*arguments):
        return CliRunner(env={"COLUMNS": "80"}).invoke(command_line(), list(arguments)).stdout.splitlines()

    short, whole = lines("run", "--help"), lines("run", "--help-all")
    assert len(short) < 70 < len(whole)
    assert max(map(len, whole)) <= 80
    text, everything = ("\n".join(page) for page in (short, whole))
    assert "[default: 0.8]" in text
    assert "<bool>" not in everything
    assert "--dry-base" not in text
    assert "--dry-base" in everything
    assert "fiddler run --help-all" in short[-1].strip() or "run --help-all" in short[-1]
    assert "[3]" in "\n".join(lines("bench", "--help"))


def test_perplexity_scores_so_many_chunks_and_version_has_a_short_name(tmp_path):
    (tmp_path / "t").write_text("Once upon a time there was a fiddler. " * 40)
    command = ["perplexity", "-f", str(tmp_path / "t"), "-c", "64", "--json"]
    windows = [
        json.loads(CliRunner().invoke(command_line(), [*command, *more]).stdout)["windows"]
        for more in ([], ["--chunks", "2"])
    ]
    assert windows[0] > windows[1] == 2
    assert CliRunner().invoke(command_line(), ["-V"]).stdout == CliRunner().invoke(command_line(), ["--version"]).stdout


def test_convert_names_its_output_itself_beside_the_folder(tmp_path, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "Tiny-Mixtral")
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(command_line(), ["convert", "."])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["Tiny-Mixtral.gguf"]
    assert "name OUT.gguf" in refusal("convert", str(tmp_path / "Tiny-Mixtral.gguf"))

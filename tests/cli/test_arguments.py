"""Wrong arguments of every command: one line that says what to type instead."""

import pytest
import typer.main
from typer.testing import CliRunner

from fiddler.cli.app import command_line
from fiddler.cli.habits import ARGUMENTS, BARE, VALUES

COMMAND_LINE = typer.main.get_command(command_line())
REQUIRED = {
    "bench": "M.gguf",
    "inspect": "M.gguf",
    "convert": "D",
    "quantize": "I.gguf O.gguf --type Q8_0",
    "batch": "I.jsonl O.jsonl",
    "perplexity": "-f T",
    "run": "",
    "serve": "",
    "calibrate": "",
}


def usage_error(*arguments):
    """The last line on stderr, after click's two on usage."""
    done = CliRunner().invoke(command_line(), list(arguments), prog_name="fiddler")
    assert (done.exit_code, done.stdout) == (2, ""), (arguments, done.exception, done.output)
    first, second, empty, line = done.stderr.splitlines()
    assert (first[:7], second[:4], empty, line[:7]) == ("Usage: ", "Try ", "", "Error: ")
    return line[7:]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("run M.gguf hello", 'unexpected argument hello; type: fiddler run M.gguf -p "hello"'),
        ("run -m M.gguf hello", 'unexpected argument hello; type: fiddler run M.gguf -p "hello"'),
        ("run M.gguf tell me more", 'unexpected argument tell; type: fiddler run M.gguf -p "tell me more"'),
        ("run tell me more", 'unexpected argument me; type: fiddler run -p "tell me more"'),
        ("run M.gguf -p tell me", 'unexpected argument me; several words need quotes: -p "tell me"'),
        ("run M.gguf -p -n 4", "unexpected argument 4: -p needs a value, and took -n for it"),
        ("perplexity M.gguf t.txt", 'unexpected argument t.txt; type: fiddler perplexity M.gguf -f "t.txt"'),
        ("batch in out M.gguf", 'unexpected argument M.gguf; type: fiddler batch in out -m "M.gguf"'),
        ("batch a b c -m M", "unexpected argument c; type: fiddler batch IN.jsonl OUT.jsonl -m M"),
        ("bench A.gguf B.gguf", "unexpected argument B.gguf; type: fiddler bench MODEL.gguf"),
        ("bench -m A.gguf -m B.gguf", "-m stands there twice; give one MODEL.gguf"),
        ("convert a b c", "unexpected argument c; type: fiddler convert SOURCE [OUT.gguf]"),
        ("batch in", "OUT.jsonl is missing; type: fiddler batch IN.jsonl OUT.jsonl"),
        ("convert --outfile O", "SOURCE is missing; type: fiddler convert SOURCE [OUT.gguf]"),
        ("perplexity M.gguf", "-f is missing; text file to score"),
        ("run -p x -n", "-n needs a value; tokens to generate; -1: until the end or --ctx"),
        ("run -p x --stats=yes", "--stats takes no value: type --stats alone, or leave it out"),
        ("run -p x --no-stats", "fiddler run has no option --no-stats: --stats is off where it is not given"),
        ("run -p x -n x", "-n / --n-predict: x is no whole number"),
        ("run -p x --seed 1.5", "--seed: 1.5 is no whole number"),
        ("run -p x --temp x", "--temp: x is no number"),
        ("run -p x -n 1_000", "-n / --n-predict: 1_000 is no whole number; write it in plain digits, as 1000"),
        ("run -p x -n 5 --temp 0_1.5", "--temp: 0_1.5 is no number; write it in plain digits, as 0.8"),
        ("serve M.gguf --port=8_080", "--port: 8_080 is no whole number; write it in plain digits, as 1000"),
        ("run -p x -c 0", "-c / --ctx: 0 must be greater than or equal to 1"),
        ("run -p x -c 1e3", "-c / --ctx: 1e3 is no whole number"),
        ("run -p x --repeat-last-n -2", "--repeat-last-n: -2 must be greater than or equal to -1"),
        ("serve M.gguf --port 65536", "--port: 65536 must be less than or equal to 65535"),
        (
            "run -p x -n --temp",
            "-n needs a value, and --temp is an option; tokens to generate; -1: until the end or --ctx",
        ),
        (
            "convert D O --dtype q8_0",
            "--dtype: 'q8_0' is not one of 'bf16', 'f16'; give --type, as --type Q4_K_M, in its place",
        ),
        ("run --promt x", "fiddler run has no option --promt; did you mean --prompt?"),
        ("run -prompt x", "fiddler run has no option -prompt; did you mean --prompt?"),
        ("run -pHello", "fiddler run has no option -pHello; a value stands by itself: -p Hello"),
        ("run -help", "fiddler run has no option -help; did you mean --help?"),
        ("run --Temp 0", "fiddler run has no option --Temp; did you mean --temp?"),
        ("run --max-token 4", "fiddler run has no option --max-token; did you mean --n-predict?"),
        ("run --frobnicate", "fiddler run has no option --frobnicate; fiddler run --help-all lists them"),
        ("run -ng 4", "fiddler run has no option -ng; fiddler run --help-all lists them"),
        ("convert D -ngl 4", "fiddler convert has no option -ngl; fiddler convert --help-all lists them"),
        ("--versoin", "no option --versoin; did you mean --version?"),
        ("--foo", "no option --foo; fiddler --help lists them"),
        ("-p hello", "-p belongs behind a command, as in: fiddler run MODEL.gguf -p TEXT"),
        ("generate M.gguf", "no command 'generate': `fiddler run MODEL.gguf -p TEXT` generates"),
        ("server", "no command 'server': `fiddler serve MODEL.gguf` is the server"),
        ("llama-cli -m M", "no command 'llama-cli': `fiddler run MODEL.gguf` generates"),
        ("llama-bench -m M", "no command 'llama-bench': did you mean `fiddler bench`?"),
        (
            "convert_hf_to_gguf.py D",
            "no command 'convert_hf_to_gguf.py': `fiddler convert DIR OUT.gguf` converts a checkpoint",
        ),
        ("hello", "no command 'hello'; fiddler --help lists them"),
    ],
)
def test_a_wrong_line_is_answered_by_what_to_type(arguments, line):
    assert usage_error(*arguments.split()) == line


@pytest.mark.parametrize("name", COMMAND_LINE.commands)
def test_every_command_refuses_one_argument_too_many_an_unknown_option_and_each_option_without_its_value(name):
    command, needed = COMMAND_LINE.commands[name], REQUIRED[name].split()
    extra = ["a"] * (1 + sum(param.param_type_name == "argument" for param in command.params))
    assert "unexpected argument a; " in usage_error(name, *needed, *extra)
    assert usage_error(name, *needed, "--frobnicate").startswith(f"fiddler {name} has no option --frobnicate")
    for param in command.params:
        for option in param.opts if param.param_type_name == "option" else ():
            if param.is_flag:
                assert usage_error(name, *needed, f"{option}=1").startswith(f"{option} takes no value")
            else:
                assert usage_error(name, *needed, option).startswith(f"{option} needs a value; ")


def test_an_argument_may_have_the_name_of_a_parameter():
    """`fiddler inspect model` is about a file called model."""
    done = CliRunner().invoke(command_line(), ["inspect", "model"])
    assert "model: no such file" in str(done.exception)


def test_arguments_given_by_name_stand_where_they_belong():
    def parsed(name, *rest):
        with COMMAND_LINE.commands[name].make_context(name, list(rest)) as context:
            return {key: str(value) for key, value in context.params.items()}

    assert parsed("convert", "--outfile", "O", "D") == parsed("convert", "D", "O")
    assert parsed("batch", "-o", "O", "-i", "I", "-m", "M") == parsed("batch", "I", "O", "-m", "M")
    assert parsed("run", "-n=4", "-c512")["count"] == "4"
    assert parsed("run", "-n=4", "-c512")["context"] == "512"


def test_a_word_that_is_no_file_may_be_a_prompt():
    done = CliRunner().invoke(command_line(), ["run", "hello"], input="x")
    assert "hello: no such file; a prompt stands behind -p: fiddler run -p hello" in str(done.exception)


def test_completion_never_meets_a_refusal(monkeypatch):
    monkeypatch.setenv("_FIDDLER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fiddler run -ngl 99 --frobnicate --te")
    monkeypatch.setenv("COMP_CWORD", "5")
    done = CliRunner().invoke(command_line(), [], prog_name="fiddler", complete_var="_FIDDLER_COMPLETE")
    assert "--temp" in done.output.split()


def test_the_tables_name_what_there_is():
    commands = COMMAND_LINE.commands
    options = {o for command in commands.values() for param in command.params for o in param.opts}
    for name, option in BARE.items():
        assert option in {o for param in commands[name].params for o in param.opts}
    assert {place for places in ARGUMENTS.values() for place in places} <= options  # an argument's name is its opts
    assert {option for option, _ in VALUES} <= options

"""Options of sampling and of constrained output, from the command line to the generated text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fiddler
from fiddler import Sampling
from fiddler.cli.app import command_line
from fiddler.cli.sampling_options import SamplingOptions, constraint_of
from fiddler.sampling.logprobs import LogProbs
from fiddler.serving.json_fields import probs_of

PROMPT = "Tom saw a red ball. Tom saw a red ball. Tom"


def run(*arguments, before="pass"):
    """`fiddler run` in a process of its own, which executes the code `before` first."""
    code = f"import sys; {before}; from fiddler.cli.app import main; main()"
    command = [sys.executable, "-c", code, "run", *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def engine():
    return fiddler.load()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--temp", -1, "temperature is -1.0"),
        ("--top-p", 2, "top_p is 2.0"),
        ("--min-p", 2, "min_p is 2.0"),
        ("--typical", 2, "typical_p is 2.0"),
        ("--repeat-penalty", 0, "repeat_penalty is 0.0"),
        ("--presence-penalty", "inf", "presence_penalty is inf"),
        ("--frequency-penalty", "nan", "frequency_penalty is nan"),
        ("--dry-multiplier", -1, "dry_multiplier is -1.0"),
        ("--dry-base", 0.5, "dry_base is 0.5"),
        ("--dry-allowed-length", -1, "dry_allowed_length is -1"),
        ("--dry-penalty-last-n", -2, "dry_penalty_last_n is -2"),
        ("--dry-sequence-breaker", "", "dry_sequence_breakers is ['']"),
        ("--xtc-probability", 2, "xtc_probability is 2.0"),
        ("--xtc-threshold", 2, "xtc_threshold is 2.0"),
        ("--logit-bias", "5+inf", "logit_bias is inf for token 5"),
    ],
)
def test_every_sampling_option_reaches_the_field_of_its_name(option, value, message):
    done = CliRunner().invoke(command_line(), ["run", "-p", "x", option, str(value)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_sampling_options_give_the_text_and_probabilities_of_the_same_sampling_in_python(engine, tmp_path):
    sampling = Sampling(
        1.2,
        60,
        0.98,
        0.01,
        1.1,
        32,
        seed=7,
        typical_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        dry_multiplier=0.8,
        dry_base=1.5,
        dry_allowed_length=1,
        dry_penalty_last_n=-1,
        dry_sequence_breakers=("\n", "aw a"),
        xtc_probability=0.5,
        xtc_threshold=0.2,
        logit_bias={300: -2.5, 301: float("-inf")},
        n_probs=2,
    )
    options = "--temp 1.2 --top-k 60 --top-p 0.98 --min-p 0.01 --repeat-penalty 1.1 --repeat-last-n 32 --seed 7 "
    options += "--typical 0.9 --presence-penalty 0.5 --frequency-penalty 0.25 --dry-multiplier 0.8 --dry-base 1.5 "
    options += "--dry-allowed-length 1 --dry-penalty-last-n -1 --xtc-probability 0.5 --xtc-threshold 0.2 --n-probs 2 "
    options += "-l 300-2.5 --logit-bias 301-inf --dry-sequence-breaker \\n -n 24"
    probs = tmp_path / "probs.jsonl"
    more = ["--dry-sequence-breaker", "aw a", "--probs-file", probs]
    done = run("-p", PROMPT, *options.split(), *more)
    expected = engine.generate(PROMPT, sampling, 24)
    assert (done.stdout.decode(), done.stderr) == (expected.text + "\n", b"")
    rows = [json.loads(line) for line in probs.read_text(encoding="utf-8").splitlines()]
    pieces = engine.tokenizer.pieces(special=True)
    for row, step in zip(rows, expected.log_probs, strict=True):
        assert row == probs_of(pieces, step)
        assert row["id"] == step.token
        assert len(row["top_logprobs"]) == 2


def test_probabilities_go_to_stderr_after_the_text():
    done = run("-p", PROMPT, "-n", 3, "--temp", 0, "--n-probs", 1)
    rows = [json.loads(line) for line in done.stderr.decode().splitlines()]
    assert "".join(bytes(row["bytes"]).decode() for row in rows) + "\n" == done.stdout.decode()
    for row in rows:  # greedy, and nothing changed the distribution
        assert row["top_logprobs"] == [{key: row[key] for key in ("id", "token", "bytes", "logprob")}]


def test_a_line_of_probabilities_has_the_fields_of_llama_cpps_server():
    line = json.loads(json.dumps(probs_of([b"a", b"\xe6"], LogProbs(1, -2.0, ((0, -0.5), (1, -2.0))))))
    assert line == {
        "id": 1,
        "token": "\ufffd",
        "bytes": [0xE6],
        "logprob": -2.0,
        "top_logprobs": [
            {"id": 0, "token": "a", "bytes": [97], "logprob": -0.5},
            {"id": 1, "token": "\ufffd", "bytes": [0xE6], "logprob": -2.0},
        ],
    }


def test_breakers_and_biases_are_read_as_llama_cpp_reads_them():
    def breakers(*options):
        return SamplingOptions(dry_sequence_breaker=list(options)).to_sampling().dry_sequence_breakers

    assert SamplingOptions().to_sampling() == Sampling()
    assert breakers("none") == ()
    assert breakers("\\n", "\\x3a", "a\\tb", "\\q") == ("\n", ":", "a\tb", "\\q")
    biases = SamplingOptions(logit_bias=["5+1", "5+0.5", "7-1e2", "8-inf"]).to_sampling().logit_bias
    assert biases == {5: 1.5, 7: -100.0, 8: float("-inf")}
    for wrong in ("5", "5*1", "x+1", "+1", "5+", "5+x", "5+inf", "5+nan"):
        with pytest.raises(typer.BadParameter):
            SamplingOptions(logit_bias=[wrong]).to_sampling()


def test_a_schema_or_grammar_may_be_a_file_or_the_text_itself(engine, tmp_path):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 23]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    done = run("-p", PROMPT, "--temp", 0, "--json-schema", file)
    assert json.loads(done.stdout) in ({"a": 1}, {"a": 23})
    assert (
        done.stdout.decode()
        == engine.generate(PROMPT, Sampling(0.0), constraint=fiddler.Constraint.json_schema(schema)).text + "\n"
    )
    assert constraint_of(str(file), None) == constraint_of(json.dumps(schema), None)
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "é" [0-9]', encoding="utf-8")
    assert constraint_of(None, str(grammar)) == constraint_of(None, 'root ::= "é" [0-9]')
    assert constraint_of(None, None) is None


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--grammar", "root ::= x"], 1, "error: the grammar cannot be read"),
        (["--grammar", "no such file"], 1, "error: no such file: cannot be read: No such file"),
        (["--json-schema", "{}", "--grammar", 'root ::= "x"'], 2, "not both"),
        (["--probs-file", "x"], 2, "needs --n-probs"),
        (
            ["--n-probs", "1", "--probs-file", "/nowhere/x"],
            1,
            "error: /nowhere/x: cannot be written: /nowhere is not",
        ),
    ],
)
def test_wrong_constraint_and_probability_options_are_refused_by_name(arguments, code, message):
    done = run("-p", "x", *arguments)
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    assert message in " ".join(done.stderr.decode().replace("│", " ").split())
    assert code == 2 or done.stderr.count(b"\n") == 1


def test_without_llguidance_one_line_says_what_to_install():
    done = run("-p", "x", "--json-schema", "{}", before="sys.modules['llguidance'] = None")
    expected = b"error: constrained output needs the llguidance package: pip install 'fiddler-moe[constrain]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", expected)


def test_a_grammar_file_that_is_not_utf_8_is_refused(tmp_path):
    (path := Path(tmp_path) / "grammar").write_bytes(b"\xff\xfe")
    with pytest.raises(fiddler.FiddlerError, match="is not UTF-8; give a grammar"):
        constraint_of(None, str(path))

"""Grammars and schemas of strangers: refused in bounded time and memory, in one line."""

from __future__ import annotations

import json
import resource
import time

import pytest

from fiddler import Constraint
from fiddler.errors import RequestError


def doubling(count: int, name: str = "r") -> str:
    """GBNF of `count` rules, each of which is the next one twice."""
    rules = "".join(f"{name}{i} ::= {name}{i + 1} {name}{i + 1}\n" for i in range(count))
    return rules.replace(f"{name}0 ", "root ", 1) + f'{name}{count} ::= "a"'


GRAMMARS = {
    "2,000 rules": (doubling(2000), "takes more than 2 s of computing|too big"),
    "unclosed brackets": ("root ::= " + "[" * 300_000, "takes more than 2 s|cannot be read"),
    "parentheses": ("start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "too deeply nested|cannot be"),
    "parentheses in GBNF": ("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000, "cannot be read"),
    "a regular expression": ("start: /" + "(" * 50_000 + "a" + ")" * 50_000 + "/", "cannot be used"),
    "two megabytes": ('start: "' + "a" * 2_000_000 + '"', "has 2000009 characters; at most 1048576"),
}
SCHEMAS = {
    "a constant": {"const": {f"k{index}": list(range(10)) for index in range(22_000)}},
    "properties": {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(15_000)}},
    "a product": {"allOf": [{"anyOf": [{"pattern": f"^{a}*{b}"} for b in "abcdefgh"]} for a in "klmnopqrst"]},
    "two megabytes": {"const": "a" * 2_000_000},
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_of_any_size_is_refused_within_its_limits(name):
    text, says = GRAMMARS[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(RequestError, match=says) as refused:
        Constraint.grammar(text)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 3.5  # [s]; 2 s and the start
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_of_any_size_is_refused_within_its_limits(name):
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(RequestError, match=r"too (big|large)|at most 1048576|takes more than 2 s") as refused:
        Constraint.json_schema(json.dumps(SCHEMAS[name]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 3.5  # [s]
    assert time.process_time() - started < 1
    assert "the JSON schema" in str(refused.value)


def test_a_grammar_is_read_as_before_where_it_takes_less():
    assert Constraint.grammar(doubling(8)).source
    assert Constraint.grammar('start: "a" | "b"').source == 'start: "a" | "b"'


@pytest.mark.parametrize("schema", [{"const": -(2**63)}, {"enum": [-(2**63), "b", 1, None]}])
def test_a_schema_at_which_the_library_crashes_is_refused(schema):
    """Version 1.9 of llguidance faults at this number; a later one may read it, and this process goes on."""

    def refusal():
        try:
            return "" if Constraint.json_schema(schema).source else "nothing"
        except RequestError as error:
            return str(error)

    assert refusal() in ("", "the JSON schema cannot be used: the library that reads it crashes; give another one")


def test_a_schema_is_read_once(monkeypatch):
    schema = {"const": "read once"}
    source = Constraint.json_schema(schema).source
    monkeypatch.setattr("subprocess.run", None)  # no other process can be started
    assert Constraint.json_schema(schema).source == source


def test_large_schemas_are_not_remembered(monkeypatch):
    schema = {"enum": [f"word {number}" for number in range(4000)]}
    assert Constraint.json_schema(schema).source
    monkeypatch.setattr("subprocess.run", None)
    with pytest.raises(TypeError):  # another process would be started
        Constraint.json_schema(schema)

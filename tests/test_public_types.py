"""The program that type checkers check (`tests/data/public_api.py`) uses every public name, and right ones only."""

import ast
from pathlib import Path

import fiddler

PROGRAM = Path(__file__).parent / "data" / "public_api.py"
NOT_CALLED = {"close"}  # the program's `with` calls it


def test_the_program_for_type_checkers_uses_the_whole_public_api():
    nodes = list(ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(fiddler.__all__) <= names
    methods = {name for name, value in vars(fiddler.Engine).items() if callable(value) and name[0] != "_"}
    assert {"generate", "stream", "batch", "logits"} <= methods
    assert methods - NOT_CALLED <= names


def test_a_type_checker_sees_names_that_are_imported_when_first_used():
    """A module's `__getattr__` would make every misspelt name a valid one."""
    body = ast.parse(Path(fiddler.__file__).read_text(encoding="utf-8")).body
    assert "__getattr__" not in {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert [fiddler.__getattr__(name).__name__ for name in fiddler.__all__] == fiddler.__all__

"""The rooms and their doors: who may import whom, held against the source. A new module is added to the tables here."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "fiddler": "fiddler",
    "converters": "fiddler.converters",
    "kernels": "fiddler.kernels",
    "models": "fiddler.models",
}

MAY_IMPORT = {
    "fiddler": "chat engine completion sampling converters constrain beam",
    "__main__": "cli",
    "cli": "fiddler description converters kernels cli_bench cli_calibrate cli_options cli_run cli_batch"
    " cli_perplexity",
    "cli_run": "cli_options completion chat cli_chat cli_sampling cli_beams",
    "cli_chat": "chat cli_options cli_terminal completion converters.output_file",
    "cli_terminal": "cli_options",
    "cli_sampling": "constrain logprobs sampling",
    "cli_batch": "chat_template cli_sampling cli_options completion engine jobs results",
    "request": "models.config tokenizer",
    "jobs": "sampling",
    "results": "jobs",
    "cli_beams": "cli_options completion engine hypotheses",
    "cli_calibrate": "cli_options calibrate hybrid model_file",
    "cli_bench": "cli_options bench bench_kernels engine gpu_timeline kernels model_file recorder",
    "cli_options": "engine model_file registration",  # inside a function
    "cli_perplexity": "cli_options converters.output_file engine model_file models.config perplexity placement"
    " popularity",
    "perplexity": "runner",
    "popularity": "models.mixtral",
    "bench": "engine kernels memory recorder",
    "bench_kernels": "kernels model_file",
    "engine": "request completion runner model_file tokenizer sampling kernels recorder devices mapped hybrid placement"
    " gpu_memory registration constrain batch memory width beam cache hypotheses prompt_cache",
    "devices": "",
    "mapped": "cpu_runner experts kernels model_file models.mixtral recorder runner",
    "cpu_runner": "cache experts kernels models.mixtral recorder runner",
    "hybrid": "cache calibrate devices experts gpu_attention gpu_decode gpu_experts gpu_grouped gpu_kernels gpu_linear"
    " gpu_memory gpu_runner kernels link mapped memory model_file models.mixtral orchestrator placement plan recorder"
    " registration staging",
    "orchestrator": "experts gpu_experts kernels plan recorder side_thread staging",
    "side_thread": "",
    "plan": "",
    "placement": "",
    "calibrate": "experts gpu_experts kernels link memory plan staging",
    "staging": "experts link recorder",
    "link": "cuda_driver registration side_thread",
    "registration": "cuda_driver memory",
    "cuda_driver": "",
    "gpu_memory": "cuda_driver",
    "gpu_experts": "experts link",
    "gpu_linear": "models.mixtral",
    "gpu_kernels": "",
    "gpu_attention": "",
    "gpu_grouped": "gpu_experts",
    "gpu_decode": "cache cuda_driver gpu_attention gpu_experts gpu_kernels models.mixtral orchestrator recorder",
    "gpu_runner": "cache gpu_decode gpu_memory kernels models.config models.mixtral runner",
    "chat": "chat_template completion constrain engine sampling",
    "chat_template": "template_process tokenizer",
    "template_process": "",
    "template_sandbox": "",
    "completion": "generate runner tokenizer sampling stopping memory logprobs cache",
    "generate": "runner cache sampling",
    "batch": "cache completion generate runner width",
    "width": "",
    "runner": "kernels cache memory models.mixtral width kept",
    "beam": "cache completion generate hypotheses kept logprobs memory runner stopping tokenizer",
    "hypotheses": "logprobs",
    "prompt_cache": "cache converters.output_file kept model_file runner",
    "kept": "cache",
    "cache": "kernels models.config models.mixtral",
    "experts": "kernels models.mixtral recorder",
    "recorder": "",
    "gpu_timeline": "recorder",
    "sampling": "logprobs penalties",
    "logprobs": "",
    "penalties": "",
    "constrain": "tokenizer",
    "stopping": "",
    "memory": "",
    "description": "model_file gguf_header",
    "model_file": "gguf_file tokenizer token_table models.config",
    "gguf_file": "gguf_header",
    "gguf_header": "",
    "tokenizer": "token_table sentencepiece_model",
    "token_table": "sentencepiece_model",
    "sentencepiece_model": "",
    "errors": "",
    # whole rooms: besides each other
    "converters.*": "models.config sentencepiece_model token_table",
    "kernels.*": "",
    "models.*": "",
}
"""Of ours, less the leading `fiddler.`. Everything may import `errors`."""

ONLY_IN = {
    "gguf": "gguf_header converters.*",
    "jinja2": "template_sandbox",  # a process of its own
    "llguidance": "constrain",  # where something is constrained
    "llvmlite": "kernels.*",
    "numba": "kernels.*",
    "matplotlib": "bench_kernels",  # where a plot is asked for
    "numpy": "batch beam bench bench_kernels cache calibrate constrain experts generate gpu_decode gpu_experts"
    " hybrid hypotheses link mapped orchestrator logprobs penalties perplexity prompt_cache sampling description"
    " model_file gguf_file"
    " gguf_header token_table"
    " converters.* kernels.*",
    "sentencepiece": "tokenizer",
    "torch": "bench_kernels calibrate devices engine runner cache experts gpu_attention gpu_decode gpu_experts"
    " gpu_grouped gpu_kernels gpu_linear gpu_memory gpu_runner gpu_timeline hybrid link mapped orchestrator perplexity"
    " popularity prompt_cache staging models.mixtral cpu_runner",
    "tqdm": "cli cli_batch cli_bench cli_options cli_perplexity",
    "triton": "gpu_attention gpu_grouped gpu_kernels",
    "typer": "cli cli_bench cli_calibrate cli_options cli_run cli_sampling cli_batch cli_perplexity cli_beams",
}
"""Every package from outside, and who may import it."""


def python_files(*folders):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def room_modules():
    """Module name, less `fiddler.`, -> file; the scripts in `models/demo` are no modules."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name.removeprefix("fiddler.")] = path
    return found


MODULES = room_modules()


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def imported(path):
    """Every module that a file imports, anywhere in it: ours less `fiddler.`, others as their package."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in submodules if name.removeprefix("fiddler.") in MODULES}
            names.update(ours if len(ours) == len(node.names) else ours | {node.module})
    found = set()
    for name in names:
        short = name.removeprefix("fiddler.")
        if name == "fiddler" or name != short:
            assert short in MODULES, f"{path.name} imports {name}, which is no module of ours"
            found.add(short)
        else:
            found.add(name.partition(".")[0])
    return found


def row(name, table):
    """The entry of a module in a table: its own, or its room's."""
    room = name.partition(".")[0]
    return table.get(name, table.get(f"{room}.*"))


def matches(name, allowed):
    return any(
        name == entry or (entry.endswith(".*") and name.split(".")[0] == entry[:-2]) for entry in allowed.split()
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    allowed = row(name, MAY_IMPORT)
    assert allowed is not None, f"{name} is a new module: say in MAY_IMPORT what it may import"
    room = name.partition(".")[0]
    ours = {other for other in imported(MODULES[name]) if other in MODULES} - {name, "errors"}
    same_room = {other for other in ours if room in ROOMS and room != "fiddler" and other.partition(".")[0] == room}
    wrong = {other for other in ours - same_room if not matches(other, allowed)}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_no_import_closes_a_circle():
    graph = {
        name: {other for other in imported(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


def test_the_table_names_modules_that_exist():
    named = {name for allowed in (*MAY_IMPORT.values(), *ONLY_IN.values()) for name in allowed.split()}
    gone = {name for name in named | MAY_IMPORT.keys() if name.removesuffix(".*") not in MODULES}
    assert not gone


@pytest.mark.parametrize("name", MODULES)
def test_packages_from_outside_are_imported_where_they_belong(name):
    outside = {other for other in imported(MODULES[name]) if other not in MODULES} - set(sys.stdlib_module_names)
    wrong = {package for package in outside if not matches(name, ONLY_IN.get(package, ""))}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_the_dependencies_are_those_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    optional = project["optional-dependencies"]
    extras = {re.match(r"[\w-]+", requirement)[0] for requirement in (*optional["plot"], *optional["constrain"])}
    assert declared | extras == ONLY_IN.keys() - {"llvmlite", "triton"}  # numba's and torch's own, in versions that fit


@pytest.mark.parametrize(
    "modules, absent",
    [
        ("fiddler", "numpy torch numba gguf typer sentencepiece"),
        ("fiddler.cli.app", "numpy torch numba gguf sentencepiece"),
        ("fiddler.files.model_file fiddler.files.inspection", "torch numba gguf sentencepiece"),
        (
            "fiddler.text.tokenizer fiddler.sampling.sampler fiddler.generation.stop_strings fiddler.models.config",
            "torch numba gguf",
        ),
        ("fiddler.converters.conversion", "torch numba"),
        ("fiddler.models.mixtral", "numba gguf"),
        ("fiddler.kernels", "torch gguf"),
    ],
)
def test_what_comes_along_with_an_import(modules, absent):
    code = f"import sys, json, {', '.join(modules.split())}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not set(absent.split()) & set(loaded)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cli"])
def test_only_the_command_line_prints_and_exits(name):
    forbidden = {"sys.exit", "SystemExit", "os._exit"}
    if name != "cli_terminal":
        forbidden.add("input")
    if not name.startswith("cli_"):
        forbidden |= {"print", "sys.stdout", "sys.stderr"}
    for node in ast.walk(tree(MODULES[name])):
        written = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        assert written not in forbidden, f"{name}, line {node.lineno}: {written}"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_all_names_what_is_public(name):
    """`__all__` names things that are there, each once, and every function and class without an underscore."""
    body = tree(MODULES[name]).body
    listed = next((n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), None)
    if MODULES[name].stem == "__init__" and len(body) == 1:
        return  # a room's docstring and nothing else
    assert listed is not None, f"{name} has no __all__"
    names = ast.literal_eval(listed)
    assert len(names) == len(set(names))
    public, present = set(), set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            present.add(node.name)
            public.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            present.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.ImportFrom | ast.If):  # `if TYPE_CHECKING`: names that are imported when asked for
            imports = [n for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            present.update(alias.asname or alias.name for n in imports for alias in n.names)
    assert set(names) <= present
    assert {n for n in public if not n.startswith("_")} <= set(names)


@pytest.mark.parametrize("path", python_files(*ROOMS, "tests"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_opens_by_saying_what_it_is_and_is_short(path):
    assert ast.get_docstring(tree(path)), "opens without a docstring"
    lines = path.read_text(encoding="utf-8").count("\n")
    if path.parent.name != "demo":  # scripts that were run once, each for itself
        assert lines <= 350, f"{lines} lines: what is its second noun?"


def test_no_path_of_somebodys_machine():
    somebodys = re.compile(r"(?<![\w.~<])/(home|root|work|tmp|Users|mnt)/\w")
    folders = [ROOT / folder for folder in (*ROOMS, "tests", "docs", ".ci")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"}]
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, a tokenizer
        assert not (found := somebodys.search(text)), f"{path.relative_to(ROOT)} names {found[0]}..."


def test_the_wheel_gets_every_package_and_data_file():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / setuptools["package-dir"].get(name, name) for name in setuptools["packages"]}
    skipped = {"tests", ".git", "build", "dist"}
    on_disk = {
        path.parent
        for path in ROOT.rglob("__init__.py")
        if not (skipped | {".venv"}) & set(path.relative_to(ROOT).parts)
    }
    assert set(folders.values()) == on_disk
    for name, folder in folders.items():
        globs = setuptools["package-data"].get(name, [])
        matched = {pattern: {path for path in folder.glob(pattern) if path.is_file()} for pattern in globs}
        assert all(matched.values()), f"of {name}: a glob that matches nothing"
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        scripts = set((folder / "demo").glob("*.py"))  # that were run once
        left_out = files - set(folder.glob("*.py")) - scripts - set().union(*matched.values())
        assert not left_out, f"of {name}, not in the wheel: {left_out}"

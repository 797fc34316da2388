"""The rooms and who may import whom, held against the source. A new room is added to the tables here."""

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
ROOMS = {"fiddler": "fiddler"} | {each: f"fiddler.{each}" for each in ("converters", "kernels", "models")}

MAY_IMPORT = {
    # the rooms of fiddler/, and its files that are a room each; everything may import `errors`
    "fiddler": "chat converters engine generation loading sampling",
    "__main__": "cli",
    "cli": "fiddler environment serving evaluation loading load_options chat engine generation sampling text offload"
    " files converters kernels telemetry models input_file",
    "serving": "engine generation sampling text files telemetry input_file",
    "evaluation": "engine runtime files kernels telemetry host_memory",
    "loading": "environment load_options engine gpu cpu files device kernels telemetry",
    "load_options": "",
    "chat": "engine generation sampling text",
    "engine": "generation sampling text runtime files host_memory",
    "generation": "cost_curve runtime sampling text models host_memory",
    "gpu": "cost_curve load_options offload runtime device files kernels models telemetry",
    "cpu": "cost_curve load_options runtime files kernels models telemetry input_file",
    "offload": "cost_curve device files kernels telemetry host_memory input_file",
    "runtime": "cost_curve files kernels models host_memory input_file",
    "telemetry": "input_file",
    "files": "kernels models text input_file",
    "sampling": "text",
    "text": "",
    "device": "host_memory",
    "host_memory": "",
    "cost_curve": "",
    "input_file": "",
    "environment": "",
    "errors": "",
    # the other three rooms at the top level
    "converters": "files text models kernels input_file",
    "kernels": "input_file",
    "models": "",
}
"""Of each room, the rooms it may import. Everything may import `errors`."""

INSIDE_KERNELS = ("machine", "codegen", "formats", "matmul", "")
"""The rooms inside kernels/, lowest first; the last one holds the doors. A file imports its own room and lower ones."""

ONLY_IN = {
    "gguf": "files.gguf_header converters",
    "jinja2": "text.template_sandbox",  # a process of its own
    "llguidance": "sampling.constraint sampling.grammar_compiler sampling.mask_worker",  # constraints
    "llvmlite": "environment files.bus_error kernels",  # LLVM's version, where a CPU's name needs a new one
    "matplotlib": "evaluation.kernel_throughput",  # where a plot is asked for
    "numba": "kernels",
    "numpy": "converters kernels cpu.loader cpu.layers evaluation files generation gpu.decode_graphs gpu.graph_capture"
    " gpu.graphs gpu.latent_kernels gpu.step gpu.step_inputs offload runtime sampling text.vocabulary"
    " device.semaphore device.weight_copy",
    "prometheus-client": "serving.http.metrics cli.serve",  # the command asks whether it is installed
    "sentencepiece": "text.spm",
    "starlette": "serving.http cli.serve",
    "tokenizers": "text.bpe text.special_tokens",  # where a vocabulary is byte-level, or a text is split at its tokens
    "torch": "converters.pytorch_file cpu device evaluation gpu models offload runtime engine loading"
    " telemetry.expert_counts telemetry.gpu_timeline telemetry.recorder",
    "tqdm": "cli",
    "triton": "gpu.attention_kernels gpu.block_expert_kernels gpu.block_gemv gpu.decode_kernels gpu.expert_kernels"
    " gpu.int8_activations gpu.int8_expert_kernels gpu.int8_gemv gpu.kv_kernels gpu.kv_rows gpu.latent_kernels"
    " gpu.router_kernels gpu.signal_kernels kernels.formats.triton_loads kernels.formats.triton_words"
    " offload.activation_kernels offload.block_kernels offload.expert_decode_kernels offload.grouped_block_kernels"
    " offload.grouped_kernels offload.host_read_kernels "
    + " ".join(f"kernels.formats.{path.stem}" for path in ROOT.glob("kernels/formats/*_triton.py")),
    "typer": "cli",
    "uvicorn": "serving.http.run cli.serve",
}
"""Every package from outside, and the rooms or files that may import it."""

NOT_TORCH = ("device.cuda_driver", "device.pinned_mapping", "models.config", "offload.plan", "offload.residency")
"""Files of rooms with torch that do without, and are imported before it."""


def python_files(*folders):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def room_modules():
    """Module name, less `fiddler.`, -> file; the scripts in `models/demo` are no modules."""
    found = {}
    for folder, package in ROOMS.items():
        for path in python_files(folder):
            if "demo" in path.parts:
                continue
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *inside)).removesuffix(".__init__")
            found[name.removeprefix("fiddler.")] = path
    return found


def room(name):
    """The room of a module: `cli` of `cli.run`."""
    return name.partition(".")[0]


MODULES = room_modules()
COMMAND_LINE = " ".join(f"fiddler.{name}" for name in MODULES if room(name) == "cli")


def test_the_table_of_imports_in_the_documentation_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Imports") : text.index("inside `kernels`")]
    rows = dict.fromkeys(MAY_IMPORT, None)
    for line in re.findall(r"^\| (`.*) \|$", table, re.M):
        names, imports = line.split(" | ")
        rows |= dict.fromkeys(re.findall(r"`(\w+)`", names), set() if imports == "nothing" else set(imports.split()))
    unlisted = {"fiddler", "__main__", "errors"}  # the package itself, its entry, and what everything may import
    assert rows == {room: None if room in unlisted else set(MAY_IMPORT[room].split()) for room in MAY_IMPORT}


def test_the_documentation_of_the_source_names_files_that_exist():
    """A path begins at the top or in fiddler/; a name without a folder lies in that of the path before it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for part in re.split(r"\n(?=\n|\|)", text):
        folder = ROOT / "fiddler"
        for name in re.findall(r"`([\w/<>.*-]+\.(?:py|md|json|html))`", part):
            pattern = re.sub(r"<\w+>", "*", name)
            folders = (ROOT, ROOT / "fiddler") if "/" in name else (folder, ROOT)
            found = [path for base in folders for path in base.glob(pattern)]
            assert found, f"{name} does not exist, or not in {folder.relative_to(ROOT)}: {part[:60]}"
            folder = found[0].parent
    for row in re.findall(r"^\|.*", text, re.M):
        assert len(row) <= 720, f"{row[:60]}... has {len(row)} characters; divide it"


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


def matches(name, allowed):
    """Whether a module is one of those listed, or in one of the rooms listed."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed.split())


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way_between_rooms(name):
    allowed = MAY_IMPORT.get(room(name))
    assert allowed is not None, f"{name} is in a new room: say in MAY_IMPORT what it may import"
    rooms = {room(other) for other in imported(MODULES[name]) if other in MODULES} - {room(name), "errors"}
    wrong = rooms - set(allowed.split())
    assert not wrong, f"{name} must not import from {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "kernels"])
def test_imports_run_one_way_inside_kernels(name):
    def level(module):
        parts = module.split(".")
        return INSIDE_KERNELS.index(parts[1] if parts[1] in INSIDE_KERNELS else "")

    if name == "kernels":
        return  # the door to all of them
    ours = {other for other in imported(MODULES[name]) if room(other) == "kernels"}
    wrong = {other for other in ours if other == "kernels" or level(other) > level(name)}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_every_row_is_of_a_room_that_exists():
    rooms = {room(name) for name in MODULES}
    assert rooms == MAY_IMPORT.keys()
    assert {other for allowed in MAY_IMPORT.values() for other in allowed.split()} <= rooms


def test_no_import_closes_a_circle_between_rooms():
    assert list(TopologicalSorter({name: allowed.split() for name, allowed in MAY_IMPORT.items()}).static_order())


def test_no_import_closes_a_circle():
    graph = {
        name: {other for other in imported(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_packages_from_outside_are_imported_where_they_belong(name):
    outside = {other for other in imported(MODULES[name]) if other not in MODULES} - set(sys.stdlib_module_names)
    outside = {package.replace("_", "-") for package in outside}
    wrong = {package for package in outside if not matches(name, ONLY_IN.get(package, ""))}
    wrong |= {"torch"} & outside if name in NOT_TORCH else set()
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_places_for_packages_from_outside_exist_and_need_them():
    needing = {package: [] for package in ONLY_IN}
    for name in MODULES:
        for package in {package.replace("_", "-") for package in imported(MODULES[name])} & ONLY_IN.keys():
            needing[package].append(name)
    for package, allowed in ONLY_IN.items():
        for entry in allowed.split():
            assert any(matches(name, entry) for name in needing[package]), f"nothing in {entry} imports {package}"


def test_the_dependencies_are_those_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    optional = project["optional-dependencies"]
    extras = {
        re.match(r"[\w-]+", requirement)[0] for name in ("plot", "constrain", "serve") for requirement in optional[name]
    }
    extras -= {"fiddler-moe"}  # with an extra of its own
    assert declared | extras == ONLY_IN.keys() - {"llvmlite", "triton"}  # numba's and torch's own, in versions that fit


@pytest.mark.parametrize(
    "modules, absent",
    [
        ("fiddler", "numpy torch numba gguf typer sentencepiece tokenizers"),
        (COMMAND_LINE, "numpy torch numba gguf sentencepiece tokenizers starlette uvicorn prometheus_client"),
        ("fiddler.files.model_file fiddler.files.inspection", "torch numba gguf sentencepiece tokenizers"),
        (
            "fiddler.text.tokenizer fiddler.sampling.sampler fiddler.generation.stop_strings fiddler.models.config",
            "torch numba gguf sentencepiece tokenizers",
        ),
        ("fiddler.loading fiddler.serving.batch_input", "torch numba gguf"),
        ("fiddler.converters.conversion", "torch numba tokenizers"),
        ("fiddler.models.transformer", "numba gguf"),
        ("fiddler.kernels", "torch gguf"),
    ],
)
def test_what_comes_along_with_an_import(modules, absent):
    code = f"import sys, json, {', '.join(modules.split())}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not set(absent.split()) & set(loaded)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("cli.app", "cli.interrupts", "__main__")])
def test_only_the_command_line_prints_and_exits(name):
    forbidden = {"sys.exit", "SystemExit", "os._exit"}
    if name != "cli.terminal":
        forbidden.add("input")
    if room(name) != "cli":
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
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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
        limit = 350 if path.is_relative_to(ROOT / "tests") else 300
        assert lines <= limit, f"{lines} lines: what is its second noun?"


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
    mapped = setuptools["package-dir"]
    folders = {name: ROOT / mapped.get(name, name.replace(".", "/")) for name in setuptools["packages"]}
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
        inner = {other for other in folders.values() if folder in other.parents}  # packages with a list of their own
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        files = {path for path in files if not inner & set(path.parents)}
        scripts = set((folder / "demo").glob("*.py"))  # that were run once
        left_out = files - set(folder.glob("*.py")) - scripts - set().union(*matched.values())
        assert not left_out, f"of {name}, not in the wheel: {left_out}"

"""Makes an environment with the oldest packages that pyproject.toml admits, and runs tests in it.

    python tests/tools/oldest_packages.py ../oldest                              # all tests
    python tests/tools/oldest_packages.py ../oldest tests/cpu tests/sampling -x  # some, with options of pytest

First come the packages that fiddler itself and its extras need, each in the version of its bound (`numba>=0.61`: 0.61),
then fiddler, which must generate, convert and answer --help. Then come those that the tests need: pip raises what they
in turn need newer, and the table says what that was. FOLDER is an environment that is there already, or becomes one
(torch's build for GPUs alone takes some 5 GB). Exit code: pytest's, or 1 where an earlier step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN_EXTRAS = ("plot", "constrain", "serve")
_BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")
_SMOKE = (
    ("fiddler", "--help"),
    ("fiddler", "run", "-p", "Once upon a time", "-n", "8", "--temp", "0", "--device", "cpu"),
    ("fiddler", "run", "-p", "A list:", "-n", "8", "--temp", "0", "--device", "cpu", "--grammar", 'root ::= "a"'),
)


def oldest() -> dict[str, str]:
    """Each package with the version of its bound. Raises ValueError for one without a bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(each for extra in OWN_EXTRAS for each in extras[extra])]
    versions = {}
    for requirement in listed:
        if requirement.startswith("fiddler-moe["):
            continue
        match = _BOUND.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in pyproject.toml has no bound of the form name>=version")
        versions[match[1]] = match[2]
    return versions


def run(folder: Path, *command: str) -> None:
    """Run a command of the environment; raise CalledProcessError where it fails."""
    print("$", *command, flush=True)
    subprocess.run([str(folder / "bin" / command[0]), *command[1:]], check=True, cwd=ROOT, env=_environment(folder))


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")])
    return {**os.environ, "VIRTUAL_ENV": str(folder), "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def installed(folder: Path) -> dict[str, str]:
    """All packages of the environment, names in lower case."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {each["name"].lower().replace("_", "-"): each["version"] for each in listed}


def table(wanted: dict[str, str], before: dict[str, str], after: dict[str, str]) -> None:
    """Print each package's bound, and its version before and after the tests' packages came."""
    print("| package | bound | installed | beside the tests' packages |\n|---|---|---|---|")
    for name, bound in wanted.items():
        print(f"| {name} | {bound} | {before.get(name, 'none')} | {after.get(name, 'none')} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the environment")
    arguments, pytest_arguments = parser.parse_known_args()
    folder, wanted = arguments.folder.absolute(), oldest()
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    try:
        run(folder, "pip", "install", "-q", *(f"{name}=={version}" for name, version in wanted.items()))
        run(folder, "pip", "install", "-q", "-e", f".[{','.join(OWN_EXTRAS)}]")
        before = installed(folder)
        for command in _SMOKE:
            run(folder, *command)
        run(folder, "pip", "install", "-q", "-e", ".[dev]")
        table(wanted, before, installed(folder))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: exit code {error.returncode} of {' '.join(map(str, error.cmd))}")
    tests = [str(folder / "bin" / "python"), "-m", "pytest", *pytest_arguments]
    done = subprocess.run(tests, cwd=ROOT, env=_environment(folder))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

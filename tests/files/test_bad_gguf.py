"""Files that must be refused: in one line, quickly, without much memory, and before torch is imported.

Every file goes through the library and, in one process per command, through both commands; some go through the real
command line, a process each.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fiddler.errors import FiddlerError, FileFormatError
from fiddler.files.gguf_file import GgufFile
from fiddler.files.model_file import ModelFile
from oracles.bad_files import CONTAINER, PATHS, Case, written
from oracles.bad_gguf import mixtral
from oracles.bad_models import MODELS
from oracles.permissions import permissions_count

CASES = {case.name: case for case in [*CONTAINER, *PATHS, *MODELS]}
COMMANDS = {"inspect": [], "run": ["-p", "x", "-n", "1"]}
SECONDS = 2.0  # of processor time; ten times that of wall time, for a busy machine
LONGEST = 1000  # of a message [characters]: far less than a name in a file may have


def assert_one_line(message: str) -> None:
    assert message.isprintable()
    assert 10 < len(message) < LONGEST


def check(path: Path) -> None:
    """Do all that `run` does before it imports torch."""
    model = ModelFile.open(path)
    model.check_runnable()
    _ = model.tokenizer


def test_the_undamaged_file_is_accepted(tmp_path):
    check(written(tmp_path, mixtral().to_bytes()))


def test_there_are_at_least_100_cases_of_different_names():
    assert len(CASES) == len(CONTAINER) + len(PATHS) + len(MODELS) >= 100


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_file_is_refused_in_one_line_that_names_the_file_and_the_value(tmp_path, case: Case):
    path = case.make(tmp_path)
    with pytest.raises(FiddlerError) as caught:
        check(path)
    message = str(caught.value)
    assert_one_line(message)
    assert case.says in message
    if len(path.name) < 100:
        assert ascii(path.name)[1:-1].split("-000")[0] in message


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inspectable])
def test_a_well_formed_file_opens_even_if_it_cannot_be_run(tmp_path, name):
    assert ModelFile.open(CASES[name].make(tmp_path)).file.tensors


def test_a_file_without_read_permission_is_refused(tmp_path):
    path = written(tmp_path, mixtral().to_bytes())
    path.chmod(0)
    with permissions_count(), pytest.raises(FileFormatError, match=r"model\.gguf: cannot be opened: Permission denied"):
        check(path)


def test_paths_that_no_system_call_accepts_are_refused():
    for path in ("a\0b.gguf", "\ud800.gguf"):
        with pytest.raises(FileFormatError, match="cannot be opened") as caught:
            check(Path(path))
        assert_one_line(str(caught.value))


DRIVER = """
import json, os, resource, signal, sys, tempfile, time
import fiddler.cli.app, fiddler.files.inspection, fiddler.files.model_file
import fiddler.sampling.sampler, fiddler.text.tokenizer, gguf
data = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (384 << 20),) * 2)  # as much as a small machine can spare
command, *rest = sys.argv[1:]
report = open(os.dup(1), "w")
for line in sys.stdin:
    sys.argv = ["fiddler", command, json.loads(line), *rest]
    signal.alarm(20)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        begin = time.process_time()
        try:
            fiddler.cli.app.main()
        except SystemExit as leaving:
            code = leaving.code
        seconds = time.process_time() - begin
        sys.stdout.flush()
        output = [file.seek(0) or file.read() for file in (out, err)]
    print(json.dumps([code, *output, seconds, "torch" in sys.modules]), file=report, flush=True)
"""


def refusals(tmp_path: Path, command: str) -> dict[str, list[object]]:
    """Each case's exit code, stdout, stderr, seconds, whether torch was imported, and file, from one process."""
    paths = []
    for case in CASES.values():
        (tmp_path / case.name).mkdir()
        paths.append(case.make(tmp_path / case.name))
    child = subprocess.run(
        [sys.executable, "-c", DRIVER, command, *COMMANDS[command]],
        input="\n".join(json.dumps(str(path)) for path in paths),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    results = map(json.loads, child.stdout.splitlines())
    return {name: [*result, path] for name, result, path in zip(CASES, results, paths, strict=True)}


def is_gguf(path: Path) -> bool:
    """Whether the container is whole, whatever model it holds: `inspect` then says why it does not run."""
    try:
        GgufFile.open(path)
    except FileFormatError:
        return False
    return True


@pytest.mark.parametrize("command", COMMANDS)
def test_both_commands_refuse_every_bad_file_with_little_time_and_memory(tmp_path, command):
    for name, (code, out, err, seconds, torch_was_imported, path) in refusals(tmp_path, command).items():
        assert seconds < SECONDS, name
        assert not torch_was_imported, name
        if command == "inspect" and is_gguf(path):
            assert (code, err) == (0, ""), name
            assert re.search(rf"^  does not run: .*{re.escape(CASES[name].says)}", out, re.M), (name, out[:500])
            continue
        assert (code, out) == (1, ""), (name, err)
        assert err.startswith("error: "), name
        assert err.endswith("\n"), name
        assert_one_line(err[:-1])
        assert CASES[name].says in err, name


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["offset_past_the_end", "pipe", "name_in_escapes", "strings_in_many_arrays", "eos_text"]
)
def test_the_real_command_line_refuses_bad_files_in_one_line(tmp_path, command, name):
    path = CASES[name].make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(
        [sys.executable, "-m", "fiddler", command, path, *COMMANDS[command]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10 * SECONDS,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if command == "inspect" and is_gguf(path):
        assert (child.returncode, child.stderr) == (0, "")
        assert re.search(rf"^  does not run: .*{re.escape(CASES[name].says)}", child.stdout, re.M)
        return
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr.startswith("error: ")
    assert_one_line(child.stderr.removesuffix("\n"))
    assert CASES[name].says in child.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS

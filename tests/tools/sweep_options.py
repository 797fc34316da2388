"""Hostile values for every option of the command line: `sweep_options.py [--every N] [--usage-only] [COMMAND...]`.

Each call first runs in a fork of a process that has imported neither torch nor Numba: wrong usage must end there, with
2 and one line. Calls that get to that import run again in another process, with a demo model: 0, or 1 and one line. No
call may take 60 s, end by a signal, say `internal:` or print a traceback. Exits 1 where one did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

SECONDS = 60  # limit of a call
LONGEST = 5000  # of what a refusal says [characters]
REACHED = 77  # exit code of a first run that gets to an import of torch or Numba
NUMBERS = [
    *["0", "-0", "1", "-1", "-2", "3", "1.5", "-0.5", "+5", "1e3", "1e-46", "1e308", "1e999", "nan", "-nan", "inf"],
    *["-inf", "0x10", "1_000", "²", "\u0663", "1,5", "1-3", "3-1", "1,2,3", "16777217", "9" * 30, "9" * 5000],
    *[str(2**31 - 1), str(2**31), str(-(2**31) - 1), str(2**63 - 1), str(2**63), str(-(2**63) - 1), str(2**64)],
    *["0.1" + "0" * 5000 + "1", "1GiB", "1e99GiB", "²GiB", "-1GiB", "5+1", "5-inf", "5+nan", "1" + "0" * 400 + "+1"],
]
TEXTS = [
    *[
        "",
        " ",
        "x",
        "-",
        "--",
        "--help",
        "None",
        "true",
        "auto",
        "cpu",
        "cuda",
        "cuda:9",
        "bf16",
        "Q8_0",
        "none",
        "all",
    ],
    *["\x1b[31mRED", "a\nb", "\x07", "\u202e", "\udcff", "é", "\U0001f600", "e\u0301", "%s%n{}", "$(x)", "\\", "\\x"],
    *["{", "{}", "[]", "null", '{"a": NaN}', '{"a": 1e999}', "[" * 5000, '{"tools": 5}', "root ::= x", 'root ::= "a"'],
    *[
        "root ::= root",
        "a" * 100_000,
        "/",
        ".",
        "..",
        "/dev/null",
        "/dev/full",
        "/nowhere/x",
        "~",
        "a" * 300,
        "../../x",
    ],
    *["/proc/self/mem", "/proc/self/environ", "/etc", "\\\\host\\x", "http://x", "*", "OUT", "MODEL", "IN"],
]
COMMANDS = {
    "run": "run MODEL -p Once -n 1 --device cpu",
    "batch": "batch IN OUT -m MODEL -n 1 --device cpu",
    "bench": "bench MODEL -p 1 -n 0 -r 1 --device cpu",
    "perplexity": "perplexity MODEL -f IN -c 8 --chunks 1 --device cpu",
    "convert": "convert TINY OUT --force",
    "quantize": "quantize MODEL OUT --type Q8_0 --force",
    "inspect": "inspect MODEL",
    "calibrate": "calibrate --show",
}  # `serve` waits for requests where its options are right


class Reached(BaseException):
    """An import of torch or Numba in a first run."""


class Barrier:
    """Refuses to find torch and Numba."""

    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numba"):
            raise Reached


def calls(chosen):
    """Every option of the chosen commands with every value, and every argument."""
    import typer

    from fiddler.cli.app import command_line

    for name, command in typer.main.get_command(command_line()).commands.items():
        if name in chosen:
            base = COMMANDS[name].split()
            for option in (param.opts[-1] for param in command.params if param.param_type_name == "option"):
                yield from ([*base, option, value] for value in NUMBERS + TEXTS)
                yield [*base, option]
                yield [*base, f"{option}="]
            for place in (at for at, word in enumerate(base) if word.isupper()):
                yield from ([*base[:place], value, *base[place + 1 :]] for value in TEXTS)


def call(arguments, folder, model):
    """Exit code and standard error of the command in this process, which must have no other threads yet."""
    from fiddler.cli.app import main

    (folder / "in").write_text('{"id": 1, "prompt": "Once upon a time there was a fiddler"}\n')
    (folder / "out").unlink(missing_ok=True)
    places = {"MODEL": model, "IN": folder / "in", "OUT": folder / "out"}
    places["TINY"] = Path(__file__).parents[1] / "data" / "tiny"
    sys.argv = ["fiddler", *(str(places.get(word, word)) for word in arguments)]
    errors = io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")
    signal.alarm(SECONDS)
    with open(os.devnull, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):  # noqa: PTH123
        try:
            main()
        except SystemExit as left:
            code = left.code
        except Reached:
            code = REACHED
        except BaseException:  # noqa: BLE001
            code, _ = "traceback", traceback.print_exc()
    signal.alarm(0)
    errors.flush()
    return code, errors.buffer.getvalue().decode(errors="replace")[-LONGEST - 1 :]


def first_run(arguments, folder, model):
    """The call in a fork."""
    end, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.meta_path.insert(0, Barrier())
        os.write(writer, json.dumps(call(arguments, folder, model)).encode())
        os._exit(0)
    os.close(writer)
    with open(end, "rb") as answer:  # noqa: PTH123
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else [f"ends with {status}", ""]


def fault(code, errors, *, again=False):
    """What is wrong with how a call ended; None if nothing is."""
    lines = errors.strip().splitlines()
    if "internal:" in errors or "Traceback" in errors or code not in (0, 1, 2, 130, REACHED):
        return "internal" if "internal:" in errors else f"{code}"
    if code and len(errors) > LONGEST:
        return "too long a line"
    if code == 2 and again:
        return "a usage error after the import of torch"
    if code in (1, 2) and not lines[-1].startswith("error: " if code == 1 else "Error: "):
        return "no line that says why"
    if code == 1 and sum(not line.startswith("warning: ") for line in lines) != 1:
        return "more lines than one"
    return None if all(line.isprintable() for line in lines) else "unprintable"


def sweep(found, folder, model, again=False):
    """Yield of every call: the arguments, exit code, standard error."""
    for arguments in found:
        yield (arguments, *(call if again else first_run)(arguments, folder, model))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commands", nargs="*", choices=[[], *COMMANDS], metavar="COMMAND")
    parser.add_argument("--every", type=int, default=1, help="only every Nth call")
    parser.add_argument("--usage-only", action="store_true", help="no second runs")
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    again, counts, reached = options.again, Counter(), []
    model = Path(__file__).parents[2] / "models" / "demo" / "stories-3m.gguf"
    found = json.load(sys.stdin) if again else list(calls(options.commands or COMMANDS))[:: options.every]
    with tempfile.TemporaryDirectory() as name:
        for arguments in (["run", "-p", "x", "--top-k", "x"], ["inspect", "MODEL"]):  # imports pydantic, numpy, gguf
            call(arguments, Path(name), model)
        os.environ["XDG_CACHE_HOME"] = name
        os.chdir(name)
        for arguments, code, errors in sweep(found, Path(name), model, again):
            wrong = fault(code, errors, again=again)
            counts[wrong or f"exit code {code}"] += 1
            if code == REACHED:
                reached.append(arguments)
            elif wrong:
                shown = [f"{word:.60}" for word in arguments[1:]]
                print(f"{wrong}: {arguments[0]} {shown!a}: {errors[-300:]!a}", flush=True)
    print(f"{len(found)} calls{' again, with torch' if again else ''}: {dict(counts)}", flush=True)
    failed = any(not kind.startswith("exit code") for kind in counts)
    if reached and not options.usage_only:
        second = subprocess.run([sys.executable, __file__, "--again"], input=json.dumps(reached).encode(), check=False)
        failed = failed or second.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Environment variables that make no sense: refused in one line, before a compiler or its threads start."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite.binding import llvm_version_info

from fiddler.environment import _CPU_NAMES, _LLVM_20_CPU_NAMES, check_environment
from fiddler.errors import RequestError
from fiddler.kernels.machine.tuning import tuning_store
from fiddler.offload.calibration import cache_folder
from oracles.command import fails_in_one_line, run

NONSENSE = [
    ("NUMBA_DISABLE_JIT", "1"),
    ("NUMBA_DISABLE_JIT", "yes"),
    ("NUMBA_DISABLE_JIT", "1" * 5000),
    ("NUMBA_NUM_THREADS", "x"),
    ("NUMBA_NUM_THREADS", "0"),
    ("NUMBA_NUM_THREADS", "-3"),
    ("NUMBA_NUM_THREADS", ""),
    ("NUMBA_NUM_THREADS", "9" * 5000),
    ("NUMBA_THREADING_LAYER", "x"),
    ("NUMBA_THREADING_LAYER", "\x1b[2J\n"),
    ("NUMBA_THREADING_LAYER_PRIORITY", "omp"),
    ("NUMBA_OPT", "4"),
    ("NUMBA_CPU_FEATURES", "avx2"),
    ("NUMBA_CPU_NAME", "nonsense"),
    ("NUMBA_BOUNDSCHECK", "true"),
    ("NUMBA_DEBUG_CACHE", "x"),
    ("OMP_NUM_THREADS", "0"),
    ("OMP_NUM_THREADS", "2,x"),
    ("OMP_THREAD_LIMIT", "x"),
    ("OMP_STACKSIZE", "large"),
]

CPU = min(os.sched_getaffinity(0))  # libgomp refuses places without a CPU of this process
OPENMP = {
    "GOMP_STACKSIZE": ["4096", "4M", "x"],
    "OMP_MAX_ACTIVE_LEVELS": ["0", "2", "x", "-1"],
    "OMP_NESTED": ["true", "x"],
    "OMP_DYNAMIC": ["true", "FALSE ", "x", "2", ""],
    "OMP_CANCELLATION": ["false", "yes"],
    "OMP_DISPLAY_AFFINITY": ["false", "on"],
    "OMP_WAIT_POLICY": ["passive", " Active", "x", "0"],
    "OMP_PROC_BIND": ["true", "close", "spread , close", "near", "true,close", "close,"],
    "OMP_SCHEDULE": ["static", "dynamic,4", "monotonic:guided", "auto", "x", "static,x", "static;4"],
    "OMP_PLACES": ["cores", "threads(1)", f"{{{CPU}}}", f"{{{CPU}:1}}", "x", "cores(x)"],
    "OMP_NUM_THREADS": ["1", "2,1", "0", "x"],
    "GOMP_SPINCOUNT": ["0", "30k", "infinity", "x", "-1x"],
    "GOMP_CPU_AFFINITY": [f"{CPU}", f"{CPU}-{CPU}", f"{CPU} {CPU}-{CPU}:1", "x", f"{CPU},x", "-1"],
}


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_a_variable_that_makes_no_sense_is_named(name, value):
    with pytest.raises(
        RequestError, match=rf"^{name} is '[ -~]*('|\.\.\.) in the environment; unset it, or give [ -~]+$"
    ):
        check_environment({name: value})


@pytest.mark.parametrize("name", OPENMP)
def test_openmp_s_variables_are_refused_where_libgomp_complains(name):
    """libgomp is loaded with each value in turn, and writes a line on those that it cannot read."""
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("no libgomp here")
    for value in OPENMP[name]:
        code = "import ctypes; ctypes.CDLL('libgomp.so.1').omp_get_max_threads()"
        environment = {"PATH": os.environ["PATH"], name: value}
        done = subprocess.run([sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True)
        assert is_refused(name, value) is ("libgomp: " in done.stderr), (value, done.stderr)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names are of x86-64 CPUs")
def test_cpu_names_are_refused_where_llvm_complains():
    code = (
        "import sys, llvmlite.binding as llvm\n"
        "llvm.initialize_native_target()\n"
        "target = llvm.Target.from_default_triple()\n"
        "for name in sys.argv[1:]:\n"
        "    target.create_target_machine(cpu=name)\n"
    )
    names = [*_CPU_NAMES.split(), *_LLVM_20_CPU_NAMES.split(), "nonsense", "zn4", "ZNVER4"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    complained = {line.split("'")[1] for line in done.stderr.splitlines() if "not a recognized processor" in line}
    assert complained == {name for name in names if is_refused("NUMBA_CPU_NAME", name)}
    newer = set(_LLVM_20_CPU_NAMES.split()) if llvm_version_info < (20,) else set()
    assert complained == {"nonsense", "zn4", "ZNVER4"} | newer


@pytest.mark.parametrize(
    "name", ["MININTERVAL", "MINITERS", "TOTAL", "NCOLS", "INITIAL", "UNIT_DIVISOR", "UNIT", "DISABLE"]
)
def test_settings_of_progress_bars_are_refused_where_tqdm_cannot_be_imported(name):
    for value in ("1", "x", "", "1.5", "-1", "nan"):
        environment = {"PATH": os.environ["PATH"], f"TQDM_{name}": value}
        command = [sys.executable, "-I", "-c", "import tqdm"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert is_refused(f"TQDM_{name}", value) is (done.returncode != 0), (value, done.stderr)


def test_a_package_that_cannot_be_imported_is_named_in_one_line():
    """As torch with nonsense in its own variables, of which there are too many to know."""
    done = run("run", "-p", "x", "-n", "1", env=os.environ | {"TORCH_LOGS": "nonsense"})
    fails_in_one_line(done, "torch cannot be imported: Invalid log settings: nonsense")


def is_refused(name, value):
    try:
        check_environment({name: value})
    except RequestError:
        return True
    return False


def test_variables_that_make_sense_pass():
    check_environment(
        {
            "NUMBA_DISABLE_JIT": "0",
            "NUMBA_NUM_THREADS": " 4",
            "NUMBA_THREADING_LAYER": "OMP",
            "NUMBA_THREADING_LAYER_PRIORITY": "omp workqueue tbb",
            "NUMBA_OPT": "max",
            "NUMBA_CPU_NAME": "x86-64-v3",
            "NUMBA_CPU_FEATURES": "+avx2,-avx512f",
            "NUMBA_CACHE_DIR": "anything",
            "NUMBA_UNKNOWN": "x",
            "OMP_NUM_THREADS": "4,2",
            "OMP_STACKSIZE": "4M",
        }
    )


@pytest.mark.parametrize(("name", "value"), [NONSENSE[0], NONSENSE[3], NONSENSE[8], ("FIDDLER_KERNEL", "x")])
def test_run_refuses_in_one_line_and_leaves_the_cached_kernels_alone(name, value, tmp_path):
    kernel = tmp_path / "a.nbc"
    kernel.write_bytes(b"kept")
    done = run("run", "-p", "x", "-n", "1", env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), name: value})
    fails_in_one_line(done, value)
    assert kernel.read_bytes() == b"kept"


def test_a_threading_layer_that_is_not_installed_is_refused_in_one_line():
    code = (
        "from fiddler import kernels; from fiddler.errors import RequestError\n"
        "try:\n"
        "    from numba.np.ufunc import tbbpool\n"
        "except ImportError:\n"
        "    try:\n"
        "        kernels.precompile(kernels.KernelVariant(kernels.choose_tier('portable'), 'bf16', 'f32'))\n"
        "    except RequestError as error:\n"
        "        print(error)\n"
    )
    environment = os.environ | {"NUMBA_THREADING_LAYER": "tbb"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("TBB is installed")
    assert done.stdout.startswith("NUMBA_THREADING_LAYER is 'tbb': No threading layer could be loaded.")
    assert done.stdout.count("\n") == 1


def test_kernels_are_refused_in_one_line_where_numba_compiles_nothing():
    """As `disable_jit` in Numba's file of settings has it, which `check_environment` does not read."""
    code = "import fiddler\ntry:\n    import fiddler.kernels\nexcept fiddler.FiddlerError as error:\n    print(error)\n"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Numba compiles nothing: unset NUMBA_DISABLE_JIT")


def test_a_user_without_a_home_has_no_stored_settings(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert tuning_store() == Path("/.cache/fiddler/tuning.json")
    assert cache_folder() == Path("/.cache/fiddler")

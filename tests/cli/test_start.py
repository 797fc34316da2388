"""The start of the command: what it imports for a model, and how often the garbage collector walks through it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref

import pytest

from fiddler.cli.collector import CollectorPause

RUN = """
import gc, json, sys
frozen = []
def at_collection(phase, info):
    if info["generation"] == 2:
        frozen.append(gc.get_freeze_count())
gc.callbacks.append(at_collection)
from fiddler.__main__ import main
sys.argv = ["fiddler", "run", "-p", "Once", "-n", "1", "--device", "cpu"]
try:
    main()
except SystemExit as left:
    assert left.code == 0
print(json.dumps([sorted(sys.modules), frozen, gc.get_freeze_count(), gc.isenabled()]))
"""


class Node:
    """Something that a weak reference can watch."""


@pytest.fixture(scope="module")
def run():
    """After a run of the demo: imported modules, the number of objects that each full collection passed over and that
    the next one would, and whether collections are on.
    """
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_imports_no_other_command_format_device_or_tokenizer(run):
    modules = set(run[0])
    rooms = {".".join(name.split(".")[:2]) for name in modules if name.startswith("fiddler.")}
    assert not rooms & {"fiddler.gpu", "fiddler.offload", "fiddler.serving", "fiddler.evaluation", "fiddler.converters"}
    others = {
        f"fiddler.cli.{name}" for name in ("batch", "bench", "calibrate", "inspect", "perplexity", "quantize", "serve")
    }
    assert not modules & others
    assert not modules & {
        f"fiddler.kernels.formats.{name}" for name in ("f32", "iq4_nl", "mxfp4", "q4_0", "q4_k", "q6_k")
    }
    assert not modules & {"fiddler.text.bpe", "fiddler.text.harmony", "tokenizers", "llguidance", "gguf"}
    assert modules >= {"fiddler.cli.run", "fiddler.kernels.formats.half", "torch", "numba"}


def test_no_full_collection_walks_through_the_modules(run):
    """Without the pause four of them do, at up to 0.13 s each."""
    _, frozen, at_the_end, enabled = run
    assert all(count > 200_000 for count in (*frozen, at_the_end))
    assert enabled


def test_collections_pause_while_modules_are_imported_and_pass_over_what_is_left():
    node, alone = Node(), Node()
    node.itself = node
    left, freed = weakref.ref(node), weakref.ref(alone)
    try:
        with CollectorPause():
            assert not gc.isenabled()
        del node, alone
        gc.collect()
        assert gc.isenabled()
        assert left() is not None  # a cycle that was there before
        assert freed() is None
    finally:
        gc.unfreeze()
    gc.collect()
    assert left() is None


def test_collections_go_on_after_an_import_that_fails():
    with pytest.raises(ModuleNotFoundError), CollectorPause():
        import no_such_module  # noqa: F401
    gc.unfreeze()
    assert gc.isenabled()

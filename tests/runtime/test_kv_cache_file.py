"""Prompt caches: what the next process finds, and every file that is refused and left as it is."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.errors import FileFormatError, RequestError
from fiddler.files.model_file import ModelFile
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.runtime.kv_cache_file import PromptCache
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
IDS = list(range(20, 60))
HEADER = struct.Struct("<8s6I32s")
AT = {"version": 1, "itemsize": 2, "layers": 3, "heads": 4, "head_dim": 5, "positions": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("prompt-cache") / "tiny.gguf")


def loaded(model, precision="exact"):
    return fiddler.load(model, precision=precision, device="cpu")


def run(engine, ids, path, count=4):
    """The greedy continuation through a prompt cache: its tokens, and how many of the prompt were there."""
    generation = engine.start(ids, GREEDY, count, prompt_cache=path)
    for _ in generation:
        continue
    return list(generation.completion.tokens), generation.completion.stats.cached_tokens


@pytest.fixture
def written(model, tmp_path):
    run(loaded(model), IDS, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    "prompt, cached, rewritten",
    [
        (IDS, 39, False),
        (IDS[:25], 24, False),
        ([*IDS, 3, 4, 5], 40, True),
        ([*IDS[:30], 9, 8], 30, True),
        ([9, *IDS], 0, True),
    ],
)
def test_the_next_process_finds_what_is_shared(model, tmp_path, precision, prompt, cached, rewritten):
    """The same text with it and without; in `fast`, too, where it is kept in 16 bits."""
    path = tmp_path / "cache"
    assert run(loaded(model, precision), IDS, path)[1] == 0
    before = path.read_bytes()
    expected = list(loaded(model, precision).generate(prompt, GREEDY, 4).tokens)
    assert run(loaded(model, precision), prompt, path) == (expected, cached)
    assert (path.read_bytes() != before) == rewritten
    assert run(loaded(model, precision), prompt, path) == (expected, len(prompt) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_read_is_what_was_computed(model, written):
    """Bit by bit, the first positions of each layer."""
    engine = loaded(model)
    sequence, other = engine.runner.sequence(), engine.runner.sequence()
    engine.runner.step([(sequence, IDS)])
    PromptCache(written, engine.model_file, torch.float32).read(other, 33)
    assert other.length == 33
    for half, made in zip(sequence.storage, other.storage, strict=True):
        for prefix_cache, found in zip(half, made, strict=True):
            assert torch.equal(prefix_cache[:, :33], found[:, :33])


def test_it_is_written_once_the_prompt_was_read(model, tmp_path):
    """So that whoever stops the answer has it; also where no token is asked for, and by beams."""
    path = tmp_path / "cache"
    running = iter(loaded(model).start(IDS, GREEDY, 9, prompt_cache=path))
    next(running)
    assert run(loaded(model), IDS, path)[1] == 39
    assert run(loaded(model), IDS, tmp_path / "other", count=0) == ([], 0)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
    loaded(model).start_beams(IDS, BeamOptions(2), 3, prompt_cache=tmp_path / "beams").run()
    assert path.read_bytes() == (tmp_path / "beams").read_bytes()


def test_an_empty_file_is_as_good_as_none(model, tmp_path):
    (tmp_path / "cache").touch()
    assert run(loaded(model), IDS, tmp_path / "cache")[1] == 0
    assert run(loaded(model), IDS, tmp_path / "cache")[1] == 39


def test_what_the_engine_keeps_is_preferred(model, written):
    """The file is not read where it has no more; and what it has more is taken."""
    engine = loaded(model)
    assert run(engine, IDS[:20], written)[1] == 19
    assert run(engine, IDS, written)[1] == 39
    assert run(engine, [*IDS, 5, 6], written)[1] == 40


def refused(engine, path, *fragments, kind=FileFormatError):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(kind) as caught:
        engine.start(IDS, GREEDY, 4, prompt_cache=path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(path), *fragments)), message
    assert before is None or path.read_bytes() == before


def test_a_file_that_is_not_ours_is_left_alone(model, tmp_path):
    engine = loaded(model)
    for content in (b"a diary", b"f", b"fiddlrkv" * 9, b"GGUF" + bytes(99)):
        (tmp_path / "diary").write_bytes(content)
        refused(engine, tmp_path / "diary", "is not a prompt cache; name another file")
    refused(engine, tmp_path, "is a directory", kind=RequestError)
    with pytest.raises(RequestError, match="nowhere is not a directory; create it first"):
        engine.start(IDS, prompt_cache=tmp_path / "nowhere" / "cache")
    running = engine.start(IDS, GREEDY, 4, prompt_cache=tmp_path / "later")
    (tmp_path / "later").write_bytes(b"a diary")  # came meanwhile
    with pytest.raises(FileFormatError, match="is not a prompt cache"):
        list(running)
    assert (tmp_path / "later").read_bytes() == b"a diary"


def test_another_models_and_another_precisions(model, written, tmp_path):
    other = write_random_mixtral(tmp_path / "other.gguf", seed=1)
    refused(loaded(other), written, "is another model's prompt cache; delete it or name another file")
    refused(loaded(model, "fast"), written, "32-bit numbers, and this --precision takes 16")


def test_models_are_told_apart(model, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    here = ModelFile.open(model).fingerprint
    assert ModelFile.open(copy).fingerprint == here
    for options in ({"seed": 1}, {"eos": 7}, {"window": 50}, {"context": 512}, {"dtype": "f16"}):
        assert ModelFile.open(write_random_mixtral(tmp_path / "other.gguf", **options)).fingerprint != here


def with_header(data, **changes):
    """The file with other numbers in its header, and the right checksum."""
    fields = list(HEADER.unpack(data[: HEADER.size]))
    for name, value in changes.items():
        fields[AT[name]] = value
    header = HEADER.pack(*fields)
    return header + struct.pack("<I", zlib.crc32(header)) + data[HEADER.size + 4 :]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "of version 2, this is 1; delete it"),
        ({"itemsize": 8}, "64-bit numbers"),
        ({"layers": 2**32 - 1}, "another model's"),
        ({"heads": 0}, "another model's"),
        ({"head_dim": 2**31}, "another model's"),
        ({"positions": 0}, "is not as long as it says; delete it"),
        ({"positions": 41}, "is not as long as it says"),
        ({"positions": 2**32 - 1}, "is not as long as it says"),
    ],
)
def test_headers_that_lie(model, written, changes, message):
    written.write_bytes(with_header(written.read_bytes(), **changes))
    refused(loaded(model), written, message)


def test_a_file_as_large_as_a_lie_needs_no_memory(model, written):
    """Positions beyond what the model was trained with, in a sparse file of that size."""
    cache = PromptCache(written, ModelFile.open(model), torch.float32)
    written.write_bytes(with_header(written.read_bytes(), positions=2**24))
    os.truncate(written, cache.nbytes(2**24))
    with pytest.raises(FileFormatError, match="is not as long as it says"):
        loaded(model).start(IDS, prompt_cache=written)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(model, written, value):
    data = bytearray(written.read_bytes())
    size = 2 * 40 * 16 * 4  # [G, positions, head_dim]
    data[-size - 4 : -size] = np.float32(value).tobytes()
    data[-4:] = struct.pack("<I", zlib.crc32(data[-size - 4 : -4]))
    written.write_bytes(data)
    refused(loaded(model), written, "holds what is no number; delete it")


def test_damage_anywhere_is_noticed(model, written):
    """One bit, a piece missing at the end or in the middle, a piece too many."""
    whole, numbers, engine = written.read_bytes(), random.Random(4), loaded(model)
    for _ in range(60):
        data, at = bytearray(whole), numbers.randrange(8, len(whole))
        kind = numbers.randrange(4)
        if kind == 0:
            data[at] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + numbers.randrange(1, 9)]
        else:
            data[at:at] = bytes(numbers.randrange(1, 9))
        written.write_bytes(data)
        refused(engine, written, "delete it")
        assert not engine.runner.prefix_cache.tokens
    written.write_bytes(whole)
    assert run(engine, IDS, written)[1] == 39


def test_a_full_disk_leaves_the_old_file(model, written, tmp_path):
    """A limit on the size of files stands for the disk."""
    before = written.read_bytes()
    code = (
        "import resource, signal, sys, fiddler; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "engine = fiddler.load(sys.argv[1], precision='exact', device='cpu')\n"
        f"g = engine.start({[9, *IDS]}, prompt_cache=sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: list(g)\nexcept fiddler.FiddlerError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, model, written], capture_output=True, text=True, check=True)
    assert "is full: File too large; make room or write elsewhere" in done.stdout
    assert written.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_on_the_command_line(model, tmp_path):
    command = [sys.executable, "-m", "fiddler", "run", model, "-p", "The old fiddler", "-n", "6", "--temp", "0"]
    command += ["--prompt-cache", tmp_path / "cache", "--stats"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout
    assert "computed before" not in first.stderr
    assert "of them computed before" in second.stderr
    (tmp_path / "cache").write_text("a diary")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

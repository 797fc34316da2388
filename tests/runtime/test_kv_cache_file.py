"""Prompt cache files: reuse by the next process, and every file that is refused and left unchanged."""

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
from fiddler.generation.request import Request
from fiddler.runtime.kv_cache_file import PromptCache
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
IDS = list(range(20, 60))
HEADER = struct.Struct("<8s6I32s")
HEADER_FIELDS = {"version": 1, "itemsize": 2, "layers": 3, "heads": 4, "head_dim": 5, "positions": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("prompt-cache") / "tiny.gguf")


def loaded(model, precision="exact"):
    return fiddler.load(model, precision=precision, device="cpu")


def run(engine, ids, path, count=4):
    """Greedy tokens with a prompt cache file, and how many tokens of the prompt were cached."""
    generation = engine.start(Request(ids, GREEDY, count), prompt_cache=path)
    for _ in generation:
        continue
    return list(generation.completion.tokens), generation.completion.stats.cached_tokens


@pytest.fixture
def cache_file(model, tmp_path):
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
def test_the_common_prefix_of_another_prompt_is_read_from_the_file(
    model, tmp_path, precision, prompt, cached, rewritten
):
    """The text is the same with the file and without; in `fast`, too, where the KV cache has 16 bits."""
    path = tmp_path / "cache"
    assert run(loaded(model, precision), IDS, path)[1] == 0
    before = path.read_bytes()
    expected = list(loaded(model, precision).generate(prompt, GREEDY, 4).tokens)
    assert run(loaded(model, precision), prompt, path) == (expected, cached)
    assert (path.read_bytes() != before) == rewritten
    assert run(loaded(model, precision), prompt, path) == (expected, len(prompt) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_keys_and_values_read_from_the_file_have_the_computed_bits(model, cache_file):
    """In the first 33 positions of each layer."""
    engine = loaded(model)
    sequence, other = engine.runner.sequence(), engine.runner.sequence()
    engine.runner.step([(sequence, IDS)])
    PromptCache(cache_file, engine.model_file, torch.float32).read(other, 33)
    assert other.length == 33
    for layer in range(engine.config.block_count):
        for computed, read in zip(sequence.stored(layer), other.stored(layer), strict=True):
            assert torch.equal(computed[:33], read)


def test_the_file_is_written_as_soon_as_the_prompt_is_read(model, tmp_path):
    """So that a stopped answer leaves it; also where no token is generated, and by beams."""
    path = tmp_path / "cache"
    running = iter(loaded(model).start(Request(IDS, GREEDY, 9), prompt_cache=path))
    next(running)
    assert run(loaded(model), IDS, path)[1] == 39
    assert run(loaded(model), IDS, tmp_path / "other", count=0) == ([], 0)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
    loaded(model).start_beams(Request(IDS, max_tokens=3), BeamOptions(2), prompt_cache=tmp_path / "beams").run()
    assert path.read_bytes() == (tmp_path / "beams").read_bytes()


def test_an_empty_file_counts_as_none(model, tmp_path):
    (tmp_path / "cache").touch()
    assert run(loaded(model), IDS, tmp_path / "cache")[1] == 0
    assert run(loaded(model), IDS, tmp_path / "cache")[1] == 39


def test_the_file_is_used_where_it_has_more_of_the_prompt_than_the_prefix_cache(model, cache_file):
    """Where it has no more, it is not read."""
    engine = loaded(model)
    assert run(engine, IDS[:20], cache_file)[1] == 19
    assert run(engine, IDS, cache_file)[1] == 39
    assert run(engine, [*IDS, 5, 6], cache_file)[1] == 40


def assert_refused(engine, path, *fragments, kind=FileFormatError):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(kind) as caught:
        engine.start(Request(IDS, GREEDY, 4), prompt_cache=path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(path), *fragments)), message
    assert before is None or path.read_bytes() == before


def test_a_file_that_is_no_prompt_cache_is_refused_and_left_alone(model, tmp_path):
    engine = loaded(model)
    for content in (b"a diary", b"f", b"fiddlrkv" * 9, b"GGUF" + bytes(99)):
        (tmp_path / "diary").write_bytes(content)
        assert_refused(engine, tmp_path / "diary", "is not a prompt cache; name another file")
    assert_refused(engine, tmp_path, "is a directory", kind=RequestError)
    os.mkfifo(tmp_path / "fifo")
    assert_refused(engine, tmp_path / "fifo", "a prompt cache is read again: name a file", kind=RequestError)
    with pytest.raises(RequestError, match="nowhere is not a directory; create it first"):
        engine.start(Request(IDS), prompt_cache=tmp_path / "nowhere" / "cache")
    running = engine.start(Request(IDS, GREEDY, 4), prompt_cache=tmp_path / "later")
    (tmp_path / "later").write_bytes(b"a diary")  # created in the meantime
    with pytest.raises(FileFormatError, match="is not a prompt cache"):
        list(running)
    assert (tmp_path / "later").read_bytes() == b"a diary"


def test_a_prompt_cache_of_another_model_or_precision_is_refused(model, cache_file, tmp_path):
    other = write_random_mixtral(tmp_path / "other.gguf", seed=1)
    assert_refused(loaded(other), cache_file, "is another model's prompt cache; delete it or name another file")
    assert_refused(
        loaded(model, "fast"),
        cache_file,
        "prompt cache of float32, and this --precision or --cache-type-k takes float16",
    )


def test_fingerprints_tell_models_apart(model, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    fingerprint = ModelFile.open(model).fingerprint
    assert ModelFile.open(copy).fingerprint == fingerprint
    for options in ({"seed": 1}, {"eos": 7}, {"window": 50}, {"context": 512}, {"dtype": "f16"}):
        assert ModelFile.open(write_random_mixtral(tmp_path / "other.gguf", **options)).fingerprint != fingerprint


def with_header(data, **changes):
    """The file with other numbers in its header and a correct checksum."""
    fields = list(HEADER.unpack(data[: HEADER.size]))
    for name, value in changes.items():
        fields[HEADER_FIELDS[name]] = value
    header = HEADER.pack(*fields)
    return header + struct.pack("<I", zlib.crc32(header)) + data[HEADER.size + 4 :]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "of version 2, this is 1; delete it"),
        ({"itemsize": 8}, "prompt cache of 8, and"),
        ({"layers": 2**32 - 1}, "another model's"),
        ({"heads": 0}, "another model's"),
        ({"head_dim": 2**31}, "another model's"),
        ({"positions": 0}, "is not as long as it says; delete it"),
        ({"positions": 41}, "is not as long as it says"),
        ({"positions": 2**32 - 1}, "is not as long as it says"),
    ],
)
def test_a_header_with_wrong_numbers_is_refused(model, cache_file, changes, message):
    cache_file.write_bytes(with_header(cache_file.read_bytes(), **changes))
    assert_refused(loaded(model), cache_file, message)


def test_a_sparse_file_of_the_size_in_a_wrong_header_is_refused(model, cache_file):
    """It has more positions than the model's context, and is refused before any memory is allocated for them."""
    cache = PromptCache(cache_file, ModelFile.open(model), torch.float32)
    cache_file.write_bytes(with_header(cache_file.read_bytes(), positions=2**24))
    os.truncate(cache_file, cache.nbytes(2**24))
    with pytest.raises(FileFormatError, match="is not as long as it says"):
        loaded(model).start(Request(IDS), prompt_cache=cache_file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_the_file_are_refused(model, cache_file, value):
    data = bytearray(cache_file.read_bytes())
    size = 2 * 40 * 16 * 4  # [G, positions, head_dim]
    data[-size - 4 : -size] = np.float32(value).tobytes()
    data[-4:] = struct.pack("<I", zlib.crc32(data[-size - 4 : -4]))
    cache_file.write_bytes(data)
    assert_refused(loaded(model), cache_file, "holds what is no number; delete it")


def test_damage_anywhere_in_the_file_is_refused(model, cache_file):
    """A flipped bit, bytes missing at the end or in the middle, or extra bytes."""
    whole, numbers, engine = cache_file.read_bytes(), random.Random(4), loaded(model)
    for _ in range(60):
        data, position = bytearray(whole), numbers.randrange(8, len(whole))
        kind = numbers.randrange(4)
        if kind == 0:
            data[position] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            del data[position:]
        elif kind == 2:
            del data[position : position + numbers.randrange(1, 9)]
        else:
            data[position:position] = bytes(numbers.randrange(1, 9))
        cache_file.write_bytes(data)
        assert_refused(engine, cache_file, "delete it")
        assert not engine.runner.matched(IDS)
    cache_file.write_bytes(whole)
    assert run(engine, IDS, cache_file)[1] == 39


def test_a_full_disk_leaves_the_old_file_unchanged(model, cache_file, tmp_path):
    """A limit on the size of files stands for the full disk."""
    before = cache_file.read_bytes()
    code = (
        "import resource, signal, sys, fiddler; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "engine = fiddler.load(sys.argv[1], precision='exact', device='cpu')\n"
        f"g = engine.start(fiddler.Request({[9, *IDS]}), prompt_cache=sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: list(g)\nexcept fiddler.FiddlerError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, model, cache_file], capture_output=True, text=True, check=True)
    assert "cache: cannot be written: File too large; make room" in done.stdout
    assert cache_file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_fiddler_run_reuses_its_prompt_cache_and_refuses_another_file(model, tmp_path):
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

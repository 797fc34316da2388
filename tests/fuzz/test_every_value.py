"""Each value of each kind of JSON input is replaced by a value of every kind, and left out: read, or refused."""

from __future__ import annotations

import json

import pytest

from fiddler.converters.checkpoint import Checkpoint
from fiddler.converters.tokenizer.tokenizer_json import TokenizerJson
from fiddler.errors import FiddlerError
from fuzz.draw import Draw, each_value_changed
from fuzz.http_seeds import BODIES
from fuzz.http_target import Exchange, checked, scope_of, server
from fuzz.small_tokenizers import SMALL
from oracles.families import make_family_checkpoint
from oracles.family_cases import CASES

FAMILIES = {case.kind: case for case in CASES.values()}


def refused(read, change):
    """Whether one line refuses the change; anything else that is raised fails the test."""
    try:
        read()
    except FiddlerError as error:
        message = str(error)
        assert message.isprintable(), change
        assert len(message) < 2000, change
        return True
    except Exception as error:
        raise AssertionError(change) from error
    return False


@pytest.mark.parametrize("kind", FAMILIES)
def test_config_json(kind, tmp_path):
    path = make_family_checkpoint(FAMILIES[kind], tmp_path) / "config.json"

    def read():
        checkpoint = Checkpoint.open(tmp_path)
        for name in checkpoint.config.tensors(tied=checkpoint.tied):
            assert all(matrix.count > 0 for matrix in checkpoint.matrices(name))

    content = json.loads(path.read_text())
    assert not refused(read, "no change")
    counts = [0, 0]
    for change, changed in each_value_changed(content):
        path.write_text(json.dumps(changed))
        counts[refused(read, change)] += 1
    assert min(counts) > 50, counts


@pytest.mark.parametrize("name", SMALL)
def test_tokenizer_json(name, tmp_path):
    path, counts = tmp_path / "tokenizer.json", [0, 0]
    for change, changed in each_value_changed(SMALL[name]()):
        path.write_text(json.dumps(changed))
        counts[refused(lambda: TokenizerJson(path).pieces(), change)] += 1
    assert min(counts) > 50, counts


@pytest.fixture(scope="module")
def running():
    """The fuzzer's server on the shipped model."""
    yield server()
    server().close()
    server.cache_clear()


@pytest.mark.parametrize("path", BODIES)
def test_bodies(running, path):
    statuses = set()
    for change, changed in each_value_changed(BODIES[path]):
        body = json.dumps(changed).encode()
        exchange = Exchange([body])
        try:
            running.call(scope_of(Draw(b""), path, "POST", len(body)), exchange)
            checked(exchange, path, "POST")
        except Exception as error:
            raise AssertionError(change) from error
        statuses.add(exchange.status)
    assert statuses >= {200, 400}, statuses

"""Options of loading: sizes as users write them, values that make no sense, and the arguments of `fiddler.load`."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

import fiddler
from fiddler.errors import RequestError
from fiddler.load_options import LoadOptions, parse_size


@pytest.mark.parametrize(
    "text,nbytes",
    [("24GiB", 24 << 30), ("24gib", 24 << 30), ("1.5 GiB", 3 << 29), ("24G", 24 * 10**9), ("8000MB", 8 * 10**9),
     ("1073741824", 1 << 30), ("512KiB", 1 << 19), ("1T", 10**12)],
)  # fmt: skip
def test_a_size_with_a_unit_is_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-1GiB", "GiB", "1PiB", "1e9", "24 apples", "٣GiB", "1" * 50])
def test_text_that_is_no_size_is_refused(text):
    with pytest.raises(RequestError, match="--gpu-memory"):
        parse_size(text)


@pytest.mark.parametrize("gpu_memory", ["24 apples", "", 0, -1])
def test_load_refuses_a_bad_size_before_it_opens_the_file(gpu_memory):
    with pytest.raises(RequestError, match=r"gpu.memory"):
        fiddler.load("never-opened.gguf", gpu_memory=gpu_memory)


@pytest.mark.parametrize("gpu_memory", ["24GiB", 24 << 30])
def test_a_size_is_the_same_as_text_and_in_bytes(gpu_memory):
    with pytest.raises(RequestError, match=r"--gpu-memory 24.00 GiB with --device cpu"):
        fiddler.load("never-opened.gguf", device="cpu", gpu_memory=gpu_memory)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"device": "tpu"}, "device is 'tpu'; give 'auto', 'cpu' or 'cuda'"),
        ({"missing": "both"}, "missing is 'both'; give 'auto', 'cpu' or 'stream'"),
        ({"precision": "best"}, "precision is 'best'; give 'fast' or 'exact'"),
        ({"context": 0}, "context is 0; give 1 or more"),
        ({"gpu_experts": -1}, "gpu_experts is -1; give 0 or more"),
        ({"gpu_memory": 0}, "gpu_memory is 0; give 1 or more"),
    ],
)
def test_options_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(RequestError, match=f"^{message}$"):
        LoadOptions(**values)


def test_options_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LoadOptions().threads = 3


def test_load_has_the_arguments_that_are_promised_and_no_others():
    parameters = inspect.signature(fiddler.load).parameters
    promised = ["path", "device", "gpu_memory", "threads", "context", "precision"]
    documented = ["kernel", "notify", "recorder", "expert_counts", "gpu_experts", "missing"]
    documented += ["cache_type_k", "cache_type_v", "progress"]
    assert list(parameters) == promised + documented
    assert [parameters[name].default for name in promised] == [None, "auto", None, None, 4096, "fast"]
    assert {field.name for field in fields(LoadOptions)} < set(parameters)
    for name in documented:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{name}:" in fiddler.load.__doc__ or f"{name}," in fiddler.load.__doc__

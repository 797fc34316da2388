"""Our sampling steps beside llama.cpp's own: `python tests/tools/compare_llama_sampling.py --library .../libllama.so`.

Not a test that pytest collects: it needs llama.cpp's shared library, built elsewhere (checked with the interface of
mid 2026). Each step gets the same random logits and tokens on both sides. llama.cpp computes in float32: cases where
that decides which tokens remain are counted apart, and logits may differ by its rounding.
"""

from __future__ import annotations

import argparse
import ctypes
from collections import Counter
from pathlib import Path

import numpy as np

from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.sampling.penalties import add_bias, lately, penalize_repeats, penalize_runs
from fiddler.sampling.sampler import Sampling, min_p, top_k, top_p, typical, xtc

BREAKERS = Sampling().dry_sequence_breakers


class Data(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(Data)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("is_sorted", ctypes.c_bool),
    )


class Bias(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int32), ("bias", ctypes.c_float))


class ModelParameters(ctypes.Structure):
    """Passed on as llama.cpp fills them: opaque, and at least as large as there."""

    _fields_ = (("bytes", ctypes.c_char * 256),)


class Llama:
    """The library, and the demo model's vocabulary in it."""

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        self.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self.silent, None)
        library.llama_model_default_params.restype = ModelParameters
        library.llama_model_load_from_file.restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, ModelParameters)
        library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_model_get_vocab.argtypes = (ctypes.c_void_p,)
        library.llama_sampler_apply.argtypes = (ctypes.c_void_p, ctypes.POINTER(Array))
        library.llama_sampler_accept.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        library.llama_sampler_free.argtypes = (ctypes.c_void_p,)
        model = library.llama_model_load_from_file(str(DEMO_MODEL).encode(), library.llama_model_default_params())
        self.vocabulary = ctypes.c_void_p(library.llama_model_get_vocab(model))

    def apply(self, name: str, logits: np.ndarray, recent: list[int], *arguments: object) -> dict[int, float]:
        """The logits that one sampler leaves, by token."""
        make = getattr(self.library, f"llama_sampler_init_{name}")
        make.restype = ctypes.c_void_p
        sampler = make(*arguments)
        for token in recent:
            self.library.llama_sampler_accept(sampler, token)
        data = (Data * logits.size)(*[Data(i, float(value), 0.0) for i, value in enumerate(logits)])
        array = Array(data, logits.size, -1, False)
        self.library.llama_sampler_apply(sampler, ctypes.byref(array))
        self.library.llama_sampler_free(sampler)
        return {array.data[i].id: array.data[i].logit for i in range(array.size)}


def whole(value: int) -> ctypes.c_int32:
    return ctypes.c_int32(value)


def real(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def cases(llama: Llama, random: np.random.Generator, pieces: list[bytes]):
    """One random case of every step: its name, our logits by token, theirs, whether float32's rounding may decide."""
    logits = (random.normal(0, random.choice([0.5, 2, 6]), random.integers(2, 60))).astype(np.float32)
    ids = top_k(logits, 0)
    none = ctypes.c_size_t(0)
    k, p = int(random.integers(1, 50)), float(np.float32(random.random()))
    probabilities = np.exp(logits[ids].astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()

    def close(values: np.ndarray) -> bool:
        return bool((np.abs(values - p) < 1e-5).any())

    def remaining(ids_left: np.ndarray) -> dict[int, float]:
        return {int(token): float(logits[token]) for token in ids_left}

    yield "top_k", remaining(top_k(logits, k)), llama.apply("top_k", logits, [], whole(k)), False
    near = close(np.cumsum(probabilities))
    yield "top_p", remaining(top_p(logits, ids, p)), llama.apply("top_p", logits, [], real(p), none), near
    near = close(probabilities / probabilities[0])
    yield "min_p", remaining(min_p(logits, ids, p)), llama.apply("min_p", logits, [], real(p), none), near
    surprise = np.abs(-np.log(probabilities) + probabilities @ np.log(probabilities))
    order = np.argsort(surprise)
    near = close(np.cumsum(probabilities[order])) or bool((np.diff(surprise[order]) < 1e-4).any())
    yield "typical", remaining(typical(logits, ids, p)), llama.apply("typical", logits, [], real(p), none), near
    p /= 2
    theirs = llama.apply("xtc", logits, [], real(1.0), real(p), none, ctypes.c_uint32(7))
    yield "xtc", remaining(xtc(logits, ids, p)), theirs, close(probabilities)

    bias = {int(token): float(random.normal()) for token in random.integers(0, logits.size, 3)}
    array = (Bias * len(bias))(*[Bias(*item) for item in bias.items()])
    theirs = llama.apply("logit_bias", logits, [], whole(logits.size), whole(len(bias)), array)
    yield "logit_bias", dict(enumerate(add_bias(logits, bias))), theirs, False

    recent = random.integers(0, logits.size, random.integers(0, 40)).tolist()
    last_tokens, penalties = int(random.integers(0, 50)), (*np.exp(random.normal(0, 0.5, 1)), *random.normal(0, 1, 2))
    repeat, presence, frequency = (float(np.float32(value)) for value in penalties)
    ours = penalize_repeats(logits, lately(recent, last_tokens), repeat, presence, frequency)
    numbers = (real(value) for value in (repeat, frequency, presence))
    theirs = llama.apply("penalties", logits, recent, whole(logits.size), whole(last_tokens), *numbers)
    yield "penalties", dict(enumerate(ours)), theirs, False

    logits = random.normal(0, 3, len(pieces)).astype(np.float32)
    recent = random.choice(dry_alphabet(pieces), random.integers(0, 90)).tolist()
    recent += recent[-int(random.integers(1, 12)) :] * int(random.integers(0, 3))
    last_tokens, allowed = int(random.integers(1, 80)), int(random.integers(0, 5))
    multiplier, base = float(np.float32(random.random() * 2)), float(np.float32(1 + random.random()))
    encoded = [text.encode() for text in BREAKERS]
    ours = penalize_runs(logits, lately(recent, last_tokens), multiplier, base, allowed, pieces, encoded)
    texts = (ctypes.c_char_p * len(encoded))(*encoded)
    numbers = (real(multiplier), real(base), whole(allowed), whole(last_tokens))
    theirs = llama.apply("dry", logits, recent, llama.vocabulary, *numbers, texts, ctypes.c_size_t(len(encoded)))
    yield "dry", dict(enumerate(ours)), theirs, False


def dry_alphabet(pieces: list[bytes]) -> list[int]:
    """A few tokens, so that runs repeat; two of them hold a breaker, as a byte and in other text."""
    holding = [token for token, piece in enumerate(pieces) if b":" in piece or b"\n" in piece or b'"' in piece]
    return [*[300, 301, 302] * 4, holding[0], holding[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="llama.cpp's libllama.so")
    parser.add_argument("-n", type=int, default=500, help="random cases of every step (500)")
    arguments = parser.parse_args()
    llama, pieces = Llama(arguments.library), ModelFile.open(DEMO_MODEL).tokenizer.pieces(special=True)
    random = np.random.default_rng(20261122)
    counts: Counter[tuple[str, str]] = Counter()
    for _ in range(arguments.n):
        for name, ours, theirs, near in cases(llama, random, pieces):
            same = ours.keys() == theirs.keys()
            same = same and np.allclose(
                [ours[token] for token in ours], [theirs[token] for token in ours], rtol=2e-6, atol=2e-6
            )
            counts[name, "same" if same else "rounding" if near else "different"] += 1
    for name in dict.fromkeys(name for name, _ in counts):
        summary = ", ".join(f"{counts[name, outcome]} {outcome}" for outcome in ("same", "rounding", "different"))
        print(f"{name:<12} {summary}")


if __name__ == "__main__":
    main()

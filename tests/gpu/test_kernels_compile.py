"""Every Triton kernel compiles for an H100. Needs Triton, but no GPU."""

from __future__ import annotations

import itertools
import re
from math import gcd

import pytest

triton = pytest.importorskip("triton")
decode_kernels = pytest.importorskip("fiddler.gpu.decode_kernels")
expert_kernels = pytest.importorskip("fiddler.gpu.expert_kernels")

import triton.language as tl  # noqa: E402
from triton.backends import compiler as backend  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fiddler.gpu import (  # noqa: E402
    attention_kernels,
    block_expert_kernels,
    block_gemv,
    int8_activations,
    int8_expert_kernels,
    int8_gemv,
    kv_kernels,
    latent_kernels,
    router_kernels,
    signal_kernels,
)
from fiddler.kernels.formats import BLOCK_FORMATS, GPU_FORMATS  # noqa: E402
from fiddler.kernels.formats.triton_decoders import DECODERS, DOTS  # noqa: E402
from fiddler.offload import (  # noqa: E402
    block_kernels,
    expert_decode_kernels,
    grouped_block_kernels,
    grouped_kernels,
    host_read_kernels,
)

KINDS = {"u": "*u8", "f": "*fp32", "h": "*fp16", "b": "*bf16", "l": "*i64", "i": "i32", "n": "i64", "s": "fp32"}
PAGED = {"P": 32, "UNIT": 32}
NO_SINKS = {"SINKS": False}
PLAIN = {"BIASED": False, "CLAMPED": False}
BOTH = {"TELL": True, "WAIT": True}
NEITHER = dict.fromkeys(BOTH, False)
BIASED = {"up": dict.fromkeys(PLAIN, True), "down": {"BIASED": True, "BY_ID": True}}
BIASED["up of many"] = BIASED["up"]
Q8_0 = {"P": 32, "UNIT": 64}
LATENT = {"WHOLE": True, "R": 64, "L": 512}
CASES = {  # name: kernel, types of its arguments in order, constants
    "gemv": (decode_kernels._gemv, "fbffii", {"ONTO": True, "ROUNDED": True, "R": 4, "K": 512}),
    "gemv of few rows": (decode_kernels._gemv, "fbffii", {"ONTO": True, "ROUNDED": True, "R": 1, "K": 1024}),
    "gemv per head": (decode_kernels._gemv_per_head, "fbfiiiii", {"w_column": 1, "R": 4, "K": 512}),
    "norm": (decode_kernels._norm, "fffis", {"K": 4096}),
    "heads": (decode_kernels._heads, "ffffffiiiiiiiis", {"NORM": True, "K": 128}),
    "heads without norms": (decode_kernels._heads, "ffffffiiiiiiiis", {"NORM": False, "K": 64}),
    "normed logits": (router_kernels._normed_logits, "fffffis", {"K": 4096}),
    "up": (
        expert_kernels._up,
        "llffffii",
        {"BY_ID": True, "W": tl.bfloat16, "ROUNDED": True, "R": 2, "K": 2048} | PLAIN,
    ),
    "down": (
        expert_kernels._down,
        "llffffii",
        {"BY_ID": False, "ADD": True, "EVEN": True, "BIASED": False, "W": tl.bfloat16, "J": 2, "R": 4, "K": 2048},
    ),
    "largest": (decode_kernels._largest, "ffli", {"K": 4096}),
    "next token": (decode_kernels._next_token, "flllii", {"N": 64}),
    "take sums": (signal_kernels._take_sums, "lniiniiffffffis", {"NORM": True, "K": 4096} | BOTH),
    "take sums that are there": (signal_kernels._take_sums, "lniiniiffffffis", {"NORM": False, "K": 128} | NEITHER),
    "hand over": (signal_kernels._hand_over, "lniiflfffi", {"TELL": True, "TOP": 2, "K": 4096}),
    "tell": (signal_kernels._tell_and_wait, "lniinii", {"TELL": True, "WAIT": False}),
    "wait": (signal_kernels._tell_and_wait, "lniinii", {"TELL": False, "WAIT": True}),
    "tell and wait": (signal_kernels._tell_and_wait, "lniinii", BOTH),
    "rotate": (kv_kernels._rotate_store, "fffflllfhhiiiiiii", PAGED | {"PAIRS": 64}),
    "rotate in 32 bits": (kv_kernels._rotate_store, "fffflllfffiiiiiii", PAGED | {"UNIT": 16, "PAIRS": 64}),
    "attend": (attention_kernels._attend, "fhhllllfffsiiiif", PAGED | NO_SINKS | {"SPLITS": 16, "N": 64, "DIM": 128}),
    "attend of many": (
        attention_kernels._attend,
        "fhhllllfffsiiiif",
        PAGED | NO_SINKS | {"SPLITS": 1, "N": 64, "DIM": 128},
    ),
    "merge": (attention_kernels._merge, "ffflfii", {"SPLITS": 16, "DIM": 128}),
    "attend to a prompt": (
        attention_kernels._attend_tile,
        "fhhllllfsiiiif",
        PAGED | NO_SINKS | {"W": tl.float16, "M": 64, "N": 64, "DIM": 128},
    ),
    "attend to a prompt in 32 bits": (
        attention_kernels._attend_tile,
        "fffllllfsiiiif",
        PAGED | NO_SINKS | {"UNIT": 16, "W": tl.float32, "M": 32, "N": 32, "DIM": 256},
    ),
    "attend to latents": (
        latent_kernels._attend_latent,
        "fhllllfffsiii",
        PAGED | LATENT | {"ALONE": False, "W": tl.float16, "M": 32, "N": 32, "C": 512},
    ),
    "attend to latents of a prompt in 32 bits": (
        latent_kernels._attend_latent,
        "ffllllfffsiii",
        PAGED | LATENT | {"UNIT": 16, "ALONE": True, "W": tl.float32, "M": 16, "N": 16, "C": 32},
    ),
    "merge latents": (latent_kernels._merge_latent, "ffflfii", {"SPLITS": 16, "M": 32, "L": 512}),
    "rotate latents": (kv_kernels._rotate_store, "fffflllfhhiiiiiii", PAGED | {"PAIRS": 512}),
    "rotate into Q8_0": (kv_kernels._rotate_store, "fffflllfuuiiiiiii", Q8_0 | {"PAIRS": 64}),
    "rotate latents into Q8_0": (kv_kernels._rotate_store, "fffflllfuuiiiiiii", Q8_0 | {"PAIRS": 512}),
    "attend to Q8_0": (
        attention_kernels._attend,
        "fuullllfffsiiiif",
        Q8_0 | NO_SINKS | {"SPLITS": 16, "N": 64, "DIM": 128},
    ),
    "attend to Q8_0 of a prompt": (
        attention_kernels._attend_tile,
        "fuullllfsiiiif",
        Q8_0 | NO_SINKS | {"W": tl.float16, "M": 64, "N": 64, "DIM": 128},
    ),
    "attend to Q8_0 of a prompt in 32 bits": (
        attention_kernels._attend_tile,
        "fuullllfsiiiif",
        Q8_0 | NO_SINKS | {"W": tl.float32, "M": 32, "N": 32, "DIM": 256},
    ),
    "attend to float16 of a prompt in 32 bits": (
        attention_kernels._attend_tile,
        "fhhllllfsiiiif",
        PAGED | NO_SINKS | {"W": tl.float32, "M": 32, "N": 32, "DIM": 128},
    ),
    "attend to latents in float16 of a prompt in 32 bits": (
        latent_kernels._attend_latent,
        "fhllllfffsiii",
        PAGED | LATENT | {"ALONE": True, "W": tl.float32, "M": 16, "N": 16, "C": 32},
    ),
    "attend to latents in Q8_0": (
        latent_kernels._attend_latent,
        "fullllfffsiii",
        Q8_0 | LATENT | {"ALONE": False, "W": tl.float16, "M": 32, "N": 16, "C": 512},
    ),
    "attend to latents in Q8_0 of a prompt in 32 bits": (
        latent_kernels._attend_latent,
        "fullllfffsiii",
        Q8_0 | LATENT | {"ALONE": True, "W": tl.float32, "M": 16, "N": 16, "C": 32},
    ),
    "attend to latents in Q8_0 behind a part of a block": (
        latent_kernels._attend_latent,
        "fullllfffsiii",
        Q8_0 | LATENT | {"WHOLE": False, "ALONE": False, "W": tl.float16, "M": 16, "N": 32, "C": 512},
    ),
    "up of many": (
        grouped_kernels._up,
        "blllbffiii",
        {"W": tl.bfloat16, "EVEN": True, "M": 128, "N": 128, "K": 64} | PLAIN,
    ),
    "down of many": (grouped_kernels._down, "blfllfiii", {"W": tl.bfloat16, "EVEN": True, "M": 16, "N": 128, "K": 64}),
    "add from host": (host_read_kernels._read, "nfi", {"kind": tl.float32, "ADD": True, "N": 4096}),
    "numbers from host": (host_read_kernels._read, "nli", {"kind": tl.int64, "ADD": False, "N": 512}),
}
SWITCHES = ("SIGMOID", "RENORMALISE", "BIASED", "SELECTION")
NO_GROUPS = {"G": 1, "GROUPS": 1, "USED": 1, "TWO": False}
ONE_OF_MANY = {"WIDE": 4096, "K": 2048, "N": 8, "TOP": 2, "J": 2}
for named in [each for each in CASES if "SINKS" in CASES[each][2]]:
    kernel, kinds, constants = CASES[named]
    CASES[f"{named} with sinks"] = kernel, kinds, constants | {"SINKS": True}
for named, biased in BIASED.items():
    kernel, kinds, constants = CASES[named]
    CASES[f"{named} with biases"] = kernel, kinds, constants | biased
for switches in itertools.product((False, True), repeat=4):
    rule = dict(zip(SWITCHES, switches, strict=True))
    named = "route: " + ", ".join(name for name in SWITCHES if rule[name])
    many = {"N": 256, "TOP": 8, "J": 8} | rule
    groups = {"G": 8, "GROUPS": 8, "USED": 4, "TWO": rule["SELECTION"]}
    CASES[named] = router_kernels._route, "fffffflfiiss", ONE_OF_MANY | rule | NO_GROUPS
    CASES[f"{named} of many"] = router_kernels._choose_each, "ffflfis", many | NO_GROUPS
    CASES[f"{named} in groups"] = router_kernels._choose_each, "ffflfis", many | groups
CASES["route 16 of 384"] = (
    router_kernels._choose_each,
    "ffflfis",
    {"N": 512, "TOP": 16, "J": 16, **dict.fromkeys(SWITCHES, True), **NO_GROUPS},
)


def compiled(kernel, kinds, constants):
    """For an H100, by a kernel, the kinds of its arguments and its constants."""
    names = kernel.arg_names
    types = dict(zip((a for a in names if a not in constants), (KINDS[kind] for kind in kinds), strict=True))
    # as at run time: addresses and sizes are multiples of 16
    even = [names.index(a) for a, kind in types.items() if kind != "fp32"]
    if hasattr(backend, "AttrsDescriptor"):  # Triton 3.2
        source = ASTSource(kernel, types, constants, backend.AttrsDescriptor.from_hints(dict.fromkeys(even, 16)))
    else:
        signature = dict.fromkeys(names, "constexpr") | types
        values = {(names.index(a),): value for a, value in constants.items()}
        source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in even})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("name", CASES)
def test_a_triton_kernel_compiles_for_an_h100(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    result = compiled(*CASES[name])
    assert result.metadata.shared <= 200 << 10  # of 227 KiB
    if name.startswith("attend"):
        assert "ld.global.v4.b32" in result.asm["ptx"] or "cp.async.cg.shared.global" in result.asm["ptx"]
    if name in (
        *("up", "up with biases", "down", "down with biases"),
        *("gemv", "gemv per head"),
    ):  # weights are read 16 bytes at a time: less would not saturate the memory
        assert "ld.global.v4.b32" in result.asm["ptx"]
        assert not re.search(r"ld\.global\.b16", result.asm["ptx"])


MANY = {"W": tl.bfloat16, "M": 64, "N": 64, "G": 2}


@pytest.mark.parametrize("kind", sorted(GPU_FORMATS))
def test_the_kernels_of_a_quantised_format_compile_for_an_h100(kind, tmp_path, monkeypatch):
    """Those that decode it, one token's and several tokens'."""
    decoder, stored = DECODERS[kind], BLOCK_FORMATS[kind]
    one = {"R": 2, "G": 32}
    down = {"DOWN": decoder, "BLOCK": stored.block_length, "BLOCK_BYTES": stored.block_bytes}
    down["ALIGNED"] = gcd(stored.block_bytes, 16)
    cases = {
        "decode": (block_kernels._decode, "ulfii", {"DECODE": decoder, "BY_ID": True, "G": 64}),
        "decode experts": (
            expert_decode_kernels._decode_matrices,
            "l",
            {"DECODE": decoder, "ALIGNED": down["ALIGNED"], "W": tl.bfloat16, "R": 4, "G": 64},
        ),
        "gemv": (block_gemv._gemv, "fuffiii", {"DECODE": decoder, "ONTO": True, **one}),
        "up": (block_expert_kernels._up, "llffffiiii", {"BY_ID": True, "GATE": decoder, "UP": decoder, **one} | PLAIN),
        "down": (
            block_expert_kernels._down,
            "llffffii",
            {"BY_ID": False, "ADD": True, "BIASED": False, "J": 2, **down, **one},
        ),
        "up of many": (
            grouped_block_kernels.up_blocks,
            "blllbffiiiii",
            {"GATE": decoder, "UP": decoder, **MANY} | PLAIN,
        ),
        "down of many": (grouped_block_kernels.down_blocks, "blfllfiii", {**down, **MANY}),
    }
    for name, biased in BIASED.items() if kind == "mxfp4" else ():
        kernel, kinds, constants = cases[name]
        cases[f"{name} with biases"] = kernel, kinds, constants | biased
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, case in cases.items():
        assert compiled(*case).metadata.shared <= 200 << 10, name  # of 227 KiB


def test_rounding_to_int8_compiles_for_an_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled(int8_activations._round, "fuii", {"G": 16})
    for rule in (dict.fromkeys(PLAIN, False), dict.fromkeys(PLAIN, True)):
        compiled(int8_activations._round_hidden, "llfuffiii", {"BY_ID": True, "G": 16} | rule)


@pytest.mark.parametrize("kind", sorted(GPU_FORMATS))
def test_the_int8_products_of_a_format_compile_for_an_h100(kind, tmp_path, monkeypatch):
    """To 4-way dot products of weights that are loaded 16 bytes at a time, and go through no shared memory."""
    dot, stored = DOTS[kind].function, BLOCK_FORMATS[kind]
    tile = {"R": 4, "P": 128}
    down = {"BLOCK": stored.block_length, "BLOCK_BYTES": stored.block_bytes, "ALIGNED": gcd(stored.block_bytes, 16)}
    up = {"BY_ID": True, "GATE": dot, "GATE_EVEN": True, "UP_EVEN": False, **tile}
    down |= {"DOT": dot, "UNIT": DOTS[kind].unit, "BY_ID": True, "ADD": True, "BIASED": True, "J": 2}
    cases = {
        "gemv": (int8_gemv._gemv, "uuffiiii", {"DOT": dot, "EVEN": False, "ONTO": True, **tile}),
        "up": (int8_expert_kernels._up, "lluf" + "i" * 6, {"UP": dot, "ALIKE": True, **up}),
        "up of two types": (
            int8_expert_kernels._up,
            "lluf" + "i" * 6,
            {"UP": DOTS["mxfp4" if kind == "q4_k" else "q4_k"].function, "ALIKE": False, **up},
        ),
        "down": (int8_expert_kernels._down, "llfuffiii", down | tile),
    }
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, case in cases.items():
        ptx = compiled(*case).asm["ptx"]
        products = ptx.split("dp4a.")
        assert len(products) - 1 >= tile["R"] * DOTS[kind].unit // 4, name
        assert "ld.global.nc.v4.b32" in ptx, name
        assert not any("bar.sync" in between for between in products[1:-1]), name
        assert not re.search(r"ld\.global\.(b8|b16)", ptx), name

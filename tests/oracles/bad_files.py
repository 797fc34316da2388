"""Files that any GGUF reader must refuse: each is valid but for one fault, and comes with a part of the error's text.

The list follows exploits of other readers. `bad_models.py` has well-formed files that are no Mixtral.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oracles.bad_gguf import (
    Q4_0,
    D,
    Draft,
    E,
    F,
    array,
    boolean,
    ints,
    mixtral,
    string,
    text,
    texts,
    u8,
    u16,
    u32,
    u64,
)

NORM, GATE, UP = "output_norm.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
TOP = 2**64 - 1


@dataclass(frozen=True)
class Case:
    """`make` writes into an empty folder and returns the path to open; `says` is a part of the error's text.

    An `inspectable` file is well formed but cannot be computed with: `inspect` shows it, `run` refuses it.
    """

    name: str
    says: str
    make: Callable[[Path], Path]
    inspectable: bool = False


def written(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def drafted(name: str, says: str, change: Callable[[Draft], object], inspectable: bool = False) -> Case:
    """The smallest Mixtral with one change."""

    def make(folder: Path) -> Path:
        draft = mixtral()
        change(draft)
        return written(folder, draft.to_bytes())

    return Case(name, says, make, inspectable)


def key(name: str, says: str, key: str, value: bytes) -> Case:
    """The smallest Mixtral with another value of a metadata key."""
    return drafted(name, says, lambda draft: draft.set(key, value))


def tensor(name: str, says: str, target: str, inspectable: bool = False, /, **changes: object) -> Case:
    """The smallest Mixtral with other attributes of a tensor's `Entry`."""

    def change(draft: Draft) -> None:
        entry = draft.entry(target)
        for attribute, value in changes.items():
            assert hasattr(entry, attribute)
            setattr(entry, attribute, value)

    return drafted(name, says, change, inspectable)


def cut(name: str, says: str, section: str, before: int) -> Case:
    """The smallest Mixtral, cut off `before` bytes ahead of the end of a section."""

    def make(folder: Path) -> Path:
        draft = mixtral()
        content = draft.to_bytes()
        return written(folder, content[: draft.ends[section] - before])

    return Case(name, says, make)


def header_only(draft: Draft) -> None:
    """Drop the tensor data: the file ends with its header."""
    for entry in draft.entries:
        entry.nbytes = 0


def key_of_any_length(folder: Path) -> Path:
    return written(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"key", TOP) + u32(1) + bytes(64))


CONTAINER = [
    drafted("magic_wrong", "b'GGML'", lambda d: setattr(d, "magic", b"GGML")),
    drafted("magic_is_escapes", r"b'\x1b[2J'", lambda d: setattr(d, "magic", b"\x1b[2J")),
    drafted("version_0", "version 0", lambda d: setattr(d, "version", struct.pack("<I", 0))),
    drafted("version_1", "version 1", lambda d: setattr(d, "version", struct.pack("<I", 1))),
    drafted("version_4", "version 4", lambda d: setattr(d, "version", struct.pack("<I", 4))),
    drafted("big_endian", "big-endian", lambda d: setattr(d, "version", struct.pack(">I", 3))),
    drafted("tensor_count_most", f"{TOP} tensors", lambda d: setattr(d, "tensor_count", TOP)),
    drafted(
        "tensor_count_one_too_many", "inside a tensor name", lambda d: (setattr(d, "tensor_count", 14), header_only(d))
    ),
    drafted("tensor_count_0", "there are only 0 tensors", lambda d: setattr(d, "entries", [])),
    drafted("pair_count_most", f"{TOP} metadata pairs", lambda d: setattr(d, "pair_count", TOP)),
    drafted("pair_count_half", f"{2**63} metadata pairs", lambda d: setattr(d, "pair_count", 2**63)),
    drafted("key_twice", "llama.block_count' appears twice", lambda d: d.pairs.append(("llama.block_count", u32(2)))),
    Case("key_length_most", f"{TOP} bytes", key_of_any_length),
    drafted("key_not_utf8", "not UTF-8", lambda d: d.pairs.append((b"gen\xfferal", u32(1)))),
    drafted("key_is_escapes", r"\x1b[31m\n", lambda d: d.pairs.extend([("\x1b[31m\n", u32(1))] * 2)),
    drafted("key_of_a_megabyte_twice", "kkk...' appears twice", lambda d: d.pairs.extend([("k" * 2**20, u8(1))] * 2)),
    key("value_type_unknown", "unknown type 13", "general.name", struct.pack("<IQ", 13, 0)),
    key("string_length_most", f"{TOP} bytes", "general.name", text("x", TOP)),
    key("string_length_past_the_end", f"{2**20} bytes", "general.name", text("x", 2**20)),
    key("string_not_utf8", "not UTF-8", "general.name", text(b"\xc3\x28")),
    key("bool_of_2", "bool of value 2", "general.flag", boolean(2)),
    key("bool_array_of_2", "bool of value 2", "general.flags", array(7, [b"\0", b"\2"])),
    key("array_of_strings_most", f"{TOP} strings", "tokenizer.ggml.tokens", texts(["a"], TOP)),
    key("array_of_strings_past_the_end", f"{2**20} strings", "tokenizer.ggml.tokens", texts(["a"], 2**20)),
    key("array_of_numbers_most", f"{TOP} values", "tokenizer.ggml.scores", array(6, [], TOP)),
    key("array_bytes_wrap_to_4", f"{2**62 + 1} values", "tokenizer.ggml.scores", array(6, [bytes(4)], 2**62 + 1)),
    key("array_nested", "unsupported type 9", "general.nested", array(9, [struct.pack("<IQ", 4, 0)] * 3)),
    key("array_of_unknown_type", "unsupported type 99", "general.odd", array(99, [bytes(8)])),
    key("alignment_0", "alignment is '0'", "general.alignment", u32(0)),
    key("alignment_odd", "alignment is '33'", "general.alignment", u32(33)),
    key("alignment_4", "alignment is '4'", "general.alignment", u32(4)),
    key("alignment_huge", "alignment is '2147483648'", "general.alignment", u32(2**31)),
    key("alignment_most", f"alignment is '{2**63}'", "general.alignment", u64(2**63)),
    key("alignment_text", r"alignment is '\x1b[0m'", "general.alignment", text("\x1b[0m")),
    key("alignment_true", "alignment is 'True'", "general.alignment", boolean(1)),
    key("alignment_array", "alignment is 'an array of 1'", "general.alignment", ints([32])),
    tensor("dims_0", "has 0 dimensions", NORM, shape=[], dims=0, nbytes=4),
    tensor("dims_5", "has 5 dimensions", NORM, shape=[1, 1, 1, 1, D]),
    tensor("dims_most", f"has {2**32 - 1} dimensions", NORM, dims=2**32 - 1),
    tensor("shape_with_0", "impossible shape (4, 0, 32)", GATE, shape=[E, 0, D]),
    tensor("shape_product_wraps_to_0", "impossible shape", GATE, shape=[2**32, 2**32, 4], nbytes=0),
    tensor("shape_most", f"impossible shape ({TOP},)", NORM, shape=[TOP], nbytes=0),
    tensor("shape_bytes_wrap", "ends at byte", GATE, shape=[2**31, 2**30], nbytes=0),
    tensor("type_unknown", "unknown type 200", NORM, kind=200, nbytes=4 * D),
    tensor("type_removed_from_ggml", "unknown type 4", NORM, kind=4, nbytes=4 * D),
    tensor("type_most", f"unknown type {2**32 - 1}", NORM, kind=2**32 - 1, nbytes=4 * D),
    tensor("type_with_partial_blocks", "not whole blocks of 32 Q4_0", GATE, shape=[E, F, 33], kind=Q4_0, nbytes=4096),
    tensor("offset_past_the_end", "ends at byte", NORM, offset=2**40),
    tensor("offset_wraps", "ends at byte", NORM, offset=2**64 - 32),
    tensor("offset_unaligned", "offset 33 is not a multiple", NORM, offset=33),
    tensor("tensor_over_another", "overlaps tensor", NORM, offset=64),
    tensor("tensor_at_the_same_place", "overlaps tensor", UP, offset=0),
    tensor("tensor_twice", f"{GATE} appears twice", UP, name=GATE),
    tensor("tensor_name_empty", "tensor name ''", NORM, name=""),
    tensor("tensor_name_long", "nnn...' is not 1 to 64", NORM, name="n" * 65),
    tensor("tensor_name_escapes", r"tensor name 'a\x1b]0;title\x07\n'", NORM, name="a\x1b]0;title\x07\n"),
    tensor("tensor_name_reverses_text", r"tensor name 'out\u202etxt.exe'", NORM, name="out\u202etxt.exe"),
    tensor("tensor_name_not_utf8", "not UTF-8", NORM, name=b"\xff\xfe"),
    tensor("tensor_name_with_nul", r"output\x00_norm", NORM, name="output\0_norm"),
    cut("cut_in_the_version", "inside version", "version", 1),
    cut("cut_in_the_counts", "inside metadata count", "counts", 7),
    cut("cut_before_the_metadata", "13 tensors, more than its 24 bytes", "counts", 0),
    cut("cut_in_the_last_value", "inside metadata key 'tokenizer.ggml.add_bos_token'", "metadata", 1),
    cut("cut_before_the_tensors", "inside a tensor name", "metadata", 0),
    cut("cut_in_the_last_tensor", "inside tensor output.weight", "tensors", 3),
    cut("cut_before_the_data", "tensor token_embd.weight ends at byte", "padding", 0),
    cut("cut_by_one_byte", "tensor output.weight ends at byte", "data", 1),
]


def sparse(folder: Path, header: bytes) -> Path:
    """Write a header to a sparse file of 64 GiB."""
    path = written(folder, header)
    os.truncate(path, 1 << 36)
    return path


def numbers_by_the_gigabyte(folder: Path) -> Path:
    pair = string("general.zeros") + array(0, [], 60 << 30)
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)


def string_of_gigabytes(folder: Path) -> Path:
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("general.name") + text("", 60 << 30))


def strings_by_the_billion(folder: Path) -> Path:
    pair = string("tokenizer.ggml.tokens") + texts([], 1 << 32)
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)


def strings_in_many_arrays(folder: Path) -> Path:
    pairs = [string(f"general.tags.{index}") + texts([""] * 2**18) for index in range(9)]
    return written(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + b"".join(pairs))


def pairs_by_the_million(folder: Path) -> Path:
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 31))


def tensors_by_the_million(folder: Path) -> Path:
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 1 << 30, 0))


def empty_keys_without_end(folder: Path) -> Path:
    return sparse(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 2))


def text_file(folder: Path) -> Path:
    return written(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def folder_of_a_model(folder: Path) -> Path:
    written(folder, b"{}", "config.json")
    return folder


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.gguf")
    return folder / "model.gguf"


def loop(folder: Path) -> Path:
    (folder / "model.gguf").symlink_to("model.gguf")
    return folder / "model.gguf"


def link_to_nothing(folder: Path) -> Path:
    (folder / "model.gguf").symlink_to("gone.gguf")
    return folder / "model.gguf"


def named_in_escapes(folder: Path) -> Path:
    return written(folder, b"GGUF", "\x1b[31mred\nerror: 2.gguf")


def split(folder: Path, *, name: str = "model-00001-of-00002.gguf", **says: bytes) -> Path:
    """Write the first of two parts of a split file; the second is missing."""
    draft = mixtral()
    for key, value in ({"no": u16(0), "count": u16(2), "tensors.count": u16(26)} | says).items():
        draft.set(f"split.{key}", value)
    return written(folder, draft.to_bytes(), name)


def parts_of_the_same_tensors(folder: Path) -> Path:
    split(folder, name="model-00002-of-00002.gguf", no=u16(1))
    return split(folder)


def second_part_says_first(folder: Path) -> Path:
    split(folder, name="model-00002-of-00002.gguf")
    return split(folder)


def second_part_unsplit(folder: Path) -> Path:
    written(folder, mixtral().to_bytes(), "model-00002-of-00002.gguf")
    return split(folder)


PATHS = [
    Case("file_missing", "gone.gguf: no such file", lambda folder: folder / "gone.gguf"),
    Case("file_empty", "is empty", lambda folder: written(folder, b"")),
    Case("file_of_3_bytes", "starts with b'GGU'", lambda folder: written(folder, b"GGU")),
    Case("file_of_text", "a Git LFS pointer", text_file),
    Case("folder", "is a folder", folder_of_a_model),
    Case("file_as_a_folder", "Not a directory", lambda folder: written(folder, b"GGUF") / "model.gguf"),
    Case("pipe", "not a regular file", pipe),
    Case("null_device", "is empty", lambda _: Path("/dev/null")),
    Case("zero_device", "not a regular file", lambda _: Path("/dev/zero")),
    Case("link_to_itself", "symbolic link", loop),
    Case("link_to_nothing", "no such file", link_to_nothing),
    Case("name_too_long", "nnn...: cannot be opened: File name too long", lambda folder: folder / ("n" * 4000)),
    Case("name_in_escapes", r"\x1b[31mred\nerror: 2.gguf: ends at byte 4", named_in_escapes),
    Case("numbers_by_the_gigabyte", f"{60 << 30} values", numbers_by_the_gigabyte),
    Case("string_of_gigabytes", f"{60 << 30} bytes long", string_of_gigabytes),
    Case("strings_by_the_billion", f"{1 << 32} strings", strings_by_the_billion),
    Case("strings_in_many_arrays", "far more than any model needs", strings_in_many_arrays),
    Case("pairs_by_the_million", f"{1 << 31} metadata pairs", pairs_by_the_million),
    Case("tensors_by_the_million", f"{1 << 30} tensors", tensors_by_the_million),
    Case("keys_of_nothing", "metadata key '' appears twice", empty_keys_without_end),
    Case("part_missing", "00002-of-00002.gguf: this part of 2 is missing", split),
    Case("part_renamed", "is not named like", lambda folder: split(folder, name="model.gguf")),
    Case("part_count_text", "split.count is '2'", lambda folder: split(folder, count=text("2"))),
    Case("part_count_array", "split.count is 'an array of 2'", lambda folder: split(folder, count=ints([2, 2]))),
    Case("part_count_other", "is one of 3 parts", lambda folder: split(folder, count=u16(3))),
    Case("part_number_other", "split.no 1 and split.count 2, but its name", lambda folder: split(folder, no=u16(1))),
    Case("part_number_array", "has split.no an array of 2 and", lambda folder: split(folder, no=ints([0, 0]))),
    Case("parts_of_the_same_tensors", "token_embd.weight appears twice", parts_of_the_same_tensors),
    Case("second_part_says_first", "00002-of-00002.gguf: has split.no 0", second_part_says_first),
    Case("second_part_unsplit", "has split.no None", second_part_unsplit),
]

"""Writes GGUF files byte by byte, so that any number in a header can be wrong. Uses nothing of fiddler or `gguf`.

`mixtral()` is the smallest valid Mixtral; a test changes one thing in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

D, F, E, K, HEADS, KV_HEADS, VOCABULARY = 32, 32, 4, 2, 2, 1, 262
F32, F16, Q4_0, Q4_0_BLOCK, BF16 = 0, 1, 2, 18, 30
_BYTES = {F32: 4, F16: 2, BF16: 2}


def u8(value: int) -> bytes:
    return struct.pack("<IB", 0, value)


def u16(value: int) -> bytes:
    return struct.pack("<IH", 2, value)


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def i32(value: int) -> bytes:
    return struct.pack("<Ii", 5, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def boolean(value: int) -> bytes:
    return struct.pack("<IB", 7, value)


def u64(value: int) -> bytes:
    return struct.pack("<IQ", 10, value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", 8) + string(value, length)


def string(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    """An array of already packed items, of GGUF value type `kind`."""
    return struct.pack("<IIQ", 9, kind, len(items) if count is None else count) + b"".join(items)


def texts(values: Sequence[str], count: int | None = None) -> bytes:
    return array(8, [string(value) for value in values], count)


def floats(values: Sequence[float]) -> bytes:
    return array(6, [struct.pack("<f", value) for value in values])


def ints(values: Sequence[int]) -> bytes:
    return array(5, [struct.pack("<i", value) for value in values])


@dataclass
class Entry:
    """One tensor; `shape` as in numpy. `offset` None: after the previous tensor. `dims` None: those of `shape`."""

    name: str | bytes
    shape: list[int]
    kind: int = BF16
    offset: int | None = None
    dims: int | None = None
    nbytes: int | None = None  # of data; None: as many as shape and type need


@dataclass
class Draft:
    """A file to write. `tensor_count`, `pair_count`: wrong counts for its header; None: the true ones."""

    pairs: list[tuple[str | bytes, bytes]]
    entries: list[Entry]
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None
    ends: dict[str, int] = field(default_factory=dict)  # section -> its end [bytes], filled by `to_bytes`

    def set(self, key: str, value: bytes) -> None:
        """Set the typed value of `key`, in its place or at the end."""
        keys = [name for name, _ in self.pairs]
        if key in keys:
            self.pairs[keys.index(key)] = key, value
        else:
            self.pairs.append((key, value))

    def drop(self, key: str) -> None:
        assert key in dict(self.pairs)
        self.pairs = [pair for pair in self.pairs if pair[0] != key]

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    def to_bytes(self) -> bytes:
        """The content of the file; tensor data are an arbitrary byte pattern."""
        header = self.magic + self.version
        self.ends["version"] = len(header)
        header += struct.pack("<Q", len(self.entries) if self.tensor_count is None else self.tensor_count)
        header += struct.pack("<Q", len(self.pairs) if self.pair_count is None else self.pair_count)
        self.ends["counts"] = len(header)
        header += b"".join(string(key) + value for key, value in self.pairs)
        self.ends["metadata"] = len(header)
        rows, end = [], 0
        for entry in self.entries:
            offset = -(-end // self.alignment) * self.alignment if entry.offset is None else entry.offset
            dims = len(entry.shape) if entry.dims is None else entry.dims
            rows.append(string(entry.name) + struct.pack("<I", dims))
            rows[-1] += b"".join(struct.pack("<Q", size) for size in reversed(entry.shape))
            rows[-1] += struct.pack("<IQ", entry.kind, offset)
            if entry.offset is None:
                end = offset + (self._size(entry) if entry.nbytes is None else entry.nbytes)
        header += b"".join(rows)
        self.ends["tensors"] = len(header)
        header += bytes(-len(header) % self.alignment)
        self.ends["padding"] = len(header)
        self.ends["data"] = len(header) + end
        return header + (bytes(range(256)) * (end // 256 + 1))[:end]

    @staticmethod
    def _size(entry: Entry) -> int:
        count = 1
        for size in entry.shape:
            count *= size
        return count * _BYTES[entry.kind]


def vocabulary() -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]


def mixtral() -> Draft:
    """One layer, four experts, two of them per token, and a vocabulary of little more than the bytes."""
    head = D // HEADS
    pairs: list[tuple[str | bytes, bytes]] = [
        ("general.architecture", text("llama")),
        ("general.name", text("smallest")),
        ("llama.vocab_size", u32(VOCABULARY)),
        ("llama.context_length", u32(64)),
        ("llama.embedding_length", u32(D)),
        ("llama.block_count", u32(1)),
        ("llama.feed_forward_length", u32(F)),
        ("llama.attention.head_count", u32(HEADS)),
        ("llama.attention.head_count_kv", u32(KV_HEADS)),
        ("llama.attention.key_length", u32(head)),
        ("llama.attention.value_length", u32(head)),
        ("llama.rope.dimension_count", u32(head)),
        ("llama.expert_count", u32(E)),
        ("llama.expert_used_count", u32(K)),
        ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
        ("llama.rope.freq_base", f32(1e6)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", texts(vocabulary())),
        ("tokenizer.ggml.scores", floats([-float(index) for index in range(VOCABULARY)])),
        ("tokenizer.ggml.token_type", ints([2, 3, 3, *[6] * 256, 1, 1, 1])),
        ("tokenizer.ggml.bos_token_id", u32(1)),
        ("tokenizer.ggml.eos_token_id", u32(2)),
        ("tokenizer.ggml.add_bos_token", boolean(1)),
    ]
    entries = [
        Entry("token_embd.weight", [VOCABULARY, D]),
        Entry("blk.0.attn_norm.weight", [D], F32),
        Entry("blk.0.attn_q.weight", [HEADS * head, D]),
        Entry("blk.0.attn_k.weight", [KV_HEADS * head, D]),
        Entry("blk.0.attn_v.weight", [KV_HEADS * head, D]),
        Entry("blk.0.attn_output.weight", [D, HEADS * head]),
        Entry("blk.0.ffn_norm.weight", [D], F32),
        Entry("blk.0.ffn_gate_inp.weight", [E, D], F32),
        Entry("blk.0.ffn_gate_exps.weight", [E, F, D]),
        Entry("blk.0.ffn_up_exps.weight", [E, F, D]),
        Entry("blk.0.ffn_down_exps.weight", [E, D, F]),
        Entry("output_norm.weight", [D], F32),
        Entry("output.weight", [VOCABULARY, D]),
    ]
    return Draft(pairs, entries)


def old_mixtral() -> Draft:
    """`mixtral` with a tensor an expert, as in files from before April 2024."""
    draft = mixtral()
    for index in range(len(draft.entries) - 1, -1, -1):
        name, shape = draft.entries[index].name, draft.entries[index].shape
        if isinstance(name, str) and "_exps." in name:
            draft.entries[index : index + 1] = [
                Entry(name.replace("_exps.", f".{expert}."), shape[1:]) for expert in range(E)
            ]
    return draft


def dense_llama() -> Draft:
    """`mixtral` with a feed-forward in place of the experts."""
    draft = mixtral()
    for key in ("llama.expert_count", "llama.expert_used_count"):
        draft.drop(key)
    draft.entries = [entry for entry in draft.entries if ".ffn_gate_inp." not in entry.name]
    for entry in draft.entries:
        if "_exps." in entry.name:
            entry.name, entry.shape = entry.name.replace("_exps", ""), entry.shape[1:]
    return draft

"""A small Llama, read from a GGUF file, that writes many texts at once.

It dequantises the file into bfloat16 once, keeps thousands of texts in flight and replaces each text that
ends by the next prompt, so that every step of the GPU is full. Prompts go through the same one-token step
as new text does. On a GPU the step is one CUDA graph around compiled pieces and two Triton kernels; on a CPU
it is plain torch, slow, for trying things out. It does not know what the texts are about.

Letters: B texts in flight, S positions a text may have, D width, F feed-forward width, H heads, G KV heads,
C head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the plain functions below do the work
    triton = None


@dataclass(frozen=True)
class Vocabulary:
    """The byte-level BPE of the file: prompts to ids, ids to text."""

    encoder: tokenizers.Tokenizer
    pieces: list[bytes]
    end: int  # <|im_end|>

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the chat markers in it become their control tokens."""
        return self.encoder.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor  # [D]
    attn_qkv: Tensor  # [(H + 2 G) C, D], rows of q and k in GGUF's order: rotary pairs side by side
    attn_output: Tensor  # [D, H C]
    ffn_norm: Tensor  # [D]
    ffn_gate_up: Tensor  # [2 F, D]
    ffn_down: Tensor  # [D, F]


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    theta: float
    token_embd: Tensor  # [V, D], also the output matrix
    output_norm: Tensor  # [D]
    layers: list[Layer]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Manner:
    """How tokens are drawn. A small model needs help to stay out of loops and to find an end."""

    temperature: float = 0.8
    min_p: float = 0.1  # tokens below this share of the best one's probability are never drawn
    presence: float = 0.45  # taken from the logit of a token that the text already has
    frequency: float = 0.15  # and this for each time that it has it, up to four
    patience: int = 100  # tokens after which the logit of the end begins to rise
    urge: float = 0.05  # by so much a token, up to `urge_limit`
    urge_limit: float = 6.0


def byte_of_letter() -> dict[str, int]:
    """The printable stand-ins for bytes, reversed (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def read_vocabulary(reader: gguf.GGUFReader) -> Vocabulary:
    """The vocabulary of a GGUF file of tokenizer model `gpt2`, pre-tokenizer `smollm`."""
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    encoder.add_special_tokens(control)
    letters = byte_of_letter()
    special = set(control)
    pieces = [b"" if t in special else bytes(letters[c] for c in t) for t in tokens]
    return Vocabulary(encoder, pieces, end=tokens.index("<|im_end|>"))


def load(path: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Model:
    """Read and dequantise a GGUF file: architecture `llama`, tied embeddings, a GPT-2 style vocabulary."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}

    def number(key: str) -> float:
        return float(reader.fields[f"llama.{key}"].contents())

    def weight(*names: str) -> Tensor:
        rows = [gguf.dequantize(tensors[name].data, tensors[name].tensor_type) for name in names]
        return torch.from_numpy(np.concatenate(rows)).to(device, dtype)

    layers = []
    for i in range(int(number("block_count"))):
        layers.append(
            Layer(
                attn_norm=weight(f"blk.{i}.attn_norm.weight"),
                attn_qkv=weight(*(f"blk.{i}.attn_{part}.weight" for part in "qkv")),
                attn_output=weight(f"blk.{i}.attn_output.weight"),
                ffn_norm=weight(f"blk.{i}.ffn_norm.weight"),
                ffn_gate_up=weight(f"blk.{i}.ffn_gate.weight", f"blk.{i}.ffn_up.weight"),
                ffn_down=weight(f"blk.{i}.ffn_down.weight"),
            )
        )
    heads = int(number("attention.head_count"))
    return Model(
        heads=heads,
        kv_heads=int(number("attention.head_count_kv")),
        head_size=int(number("embedding_length")) // heads,
        eps=number("attention.layer_norm_rms_epsilon"),
        theta=number("rope.freq_base"),
        token_embd=weight("token_embd.weight"),
        output_norm=weight("output_norm.weight"),
        layers=layers,
        vocabulary=read_vocabulary(reader),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last axis, in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def enter(
    x: Tensor,
    norm: Tensor,
    qkv: Tensor,
    turn: Tensor,
    slots: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> Tensor:
    """From the residual stream [B, D] to queries [B, H, C]; this step's keys and values go into the cache."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    y = F.linear(rms_norm(x, norm, eps), qkv).view(x.shape[0], -1, size)
    q, k, v = y.split([y.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = turn[positions].unsqueeze(1).unbind(-1)  # [B, 1, C/2] each

    def rotate(z: Tensor) -> Tensor:
        even, odd = z.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(z.dtype)

    keys[slots, :, positions] = rotate(k)
    values[slots, :, positions] = v
    return rotate(q)


def leave(
    x: Tensor, attended: Tensor, output: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The second half of a layer: output projection and feed-forward, both added to the residual stream."""
    x = x + F.linear(attended.flatten(1), output)
    gate, up = F.linear(rms_norm(x, norm, eps), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def attend_plain(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """One query a head against that text's cache: q [B, H, C], keys and values [B, G, S, C] -> [B, H, C]."""
    reach = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]  # [B, S]
    y = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, reach[:, None, None, :], enable_gqa=True)
    return y.squeeze(2)


def sample_plain(logits: Tensor, counts: Tensor, urge: Tensor, step: Tensor, end: int, manner: Manner) -> Tensor:
    """Draw by the Gumbel trick: logits, counts [B, V] -> [B]. `urge` [B] is added to the logit of `end`."""
    x = logits.float() - manner.presence * (counts > 0) - manner.frequency * counts.clamp(max=4)
    x[:, end] += urge
    x = x / manner.temperature
    allowed = x >= x.amax(-1, keepdim=True) + math.log(manner.min_p)
    noise = -torch.empty_like(x).exponential_().log()
    return torch.where(allowed, x + noise, float("-inf")).argmax(-1)


if triton is not None:

    @triton.jit
    def _attend(
        q: tl.tensor, keys: tl.tensor, values: tl.tensor, out: tl.tensor, positions: tl.tensor, length: int,
        scale: float, G: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ) -> None:  # fmt: skip
        # One program: the GROUP query heads of a text that share a KV head, against the filled cache.
        text = tl.program_id(0)
        kv_head = tl.program_id(1)
        filled = tl.load(positions + text).to(tl.int32) + 1
        row = tl.arange(0, 16)  # a matrix product needs 16 rows; GROUP of them are real
        dim = tl.arange(0, C)
        at = (text * G + kv_head) * GROUP * C + row[:, None] * C + dim[None, :]
        real = (row < GROUP)[:, None]
        query = tl.load(q + at, mask=real, other=0.0)
        start = (text * G + kv_head).to(tl.int64) * length * C
        best = tl.full([16], float("-inf"), tl.float32)
        total = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, C], tl.float32)
        for first in range(0, filled, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < filled
            key = tl.load(keys + start + place[None, :] * C + dim[:, None], mask=inside[None, :], other=0.0)
            score = tl.where(inside[None, :], tl.dot(query, key) * scale, float("-inf"))
            higher = tl.maximum(best, tl.max(score, 1))
            shrink = tl.exp(best - higher)
            weight = tl.exp(score - higher[:, None])
            value = tl.load(values + start + place[:, None] * C + dim[None, :], mask=inside[:, None], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
            total = total * shrink + tl.sum(weight, 1)
            best = higher
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)

    @triton.jit
    def _wanted(
        logits: tl.tensor, counts: tl.tensor, at: tl.tensor, end: int, urge: tl.tensor, presence: float,
        frequency: float, inverse_temperature: float, V: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        count = tl.load(counts + at, mask=at < V, other=0).to(tl.float32)
        x = x - tl.where(count > 0, presence, 0.0) - frequency * tl.minimum(count, 4.0)
        return (x + tl.where(at == end, urge, 0.0)) * inverse_temperature

    @triton.jit
    def _sample(
        logits: tl.tensor, counts: tl.tensor, urges: tl.tensor, out: tl.tensor, step: tl.tensor, end: int,
        presence: float, frequency: float, inverse_temperature: float, log_min_p: float,
        V: tl.constexpr, BLOCK: tl.constexpr,
    ) -> None:  # fmt: skip
        # One program: one row. First pass: the highest logit. Second pass: the Gumbel trick above the floor.
        text = tl.program_id(0)
        lane = tl.arange(0, BLOCK)
        row = logits + text.to(tl.int64) * V
        seen = counts + text.to(tl.int64) * V
        urge = tl.load(urges + text)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, V, BLOCK):
            top = tl.maximum(
                top, _wanted(row, seen, first + lane, end, urge, presence, frequency, inverse_temperature, V)
            )
        floor = tl.max(top, 0) + log_min_p
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        chosen = tl.zeros([BLOCK], tl.int32)
        seed = tl.load(step).to(tl.int32)
        for first in range(0, V, BLOCK):
            x = _wanted(row, seen, first + lane, end, urge, presence, frequency, inverse_temperature, V)
            uniform = tl.maximum(tl.rand(seed, text * V + first + lane), 1e-10)
            x = tl.where(x >= floor, x - tl.log(-tl.log(uniform)), float("-inf"))
            chosen = tl.where(x > best, first + lane, chosen)
            best = tl.maximum(best, x)
        winner = tl.min(tl.where(best == tl.max(best, 0), chosen, V), 0)
        tl.store(out + text, winner.to(tl.int64))


def attend_triton(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`attend_plain`, reading no more of the cache than is filled."""
    texts, heads, size = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    _attend[(texts, kv_heads)](
        q,
        keys,
        values,
        out,
        positions,
        length,
        size**-0.5,
        G=kv_heads,
        GROUP=heads // kv_heads,
        C=size,
        BLOCK=64,
        num_warps=4,
    )
    return out


def sample_triton(logits: Tensor, counts: Tensor, urge: Tensor, step: Tensor, end: int, manner: Manner) -> Tensor:
    """`sample_plain` in two passes; `step` seeds the noise, it must differ from call to call."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _sample[(logits.shape[0],)](
        logits, counts, urge, out, step, end, manner.presence, manner.frequency, 1 / manner.temperature,
        math.log(manner.min_p), V=logits.shape[1], BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return out


@dataclass
class Writer:
    """Texts in flight. `write` takes prompts and yields what was written after each, as they finish."""

    model: Model
    texts: int
    length: int
    manner: Manner
    fast: bool
    written: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        model, device = self.model, self.model.token_embd.device
        shape = (self.texts, model.kv_heads, self.length, model.head_size)
        self.keys = [torch.zeros(shape, dtype=model.token_embd.dtype, device=device) for _ in model.layers]
        self.values = [torch.zeros_like(k) for k in self.keys]
        rates = model.theta ** (-torch.arange(0, model.head_size, 2, device=device).float() / model.head_size)
        angles = torch.arange(self.length, device=device).float()[:, None] * rates
        self.turn = torch.stack((angles.cos(), angles.sin()), -1)  # [S, C/2, 2]
        self.slots = torch.arange(self.texts, device=device)
        self.ids = torch.zeros(self.texts, self.length, dtype=torch.int64, device=device)
        self.positions = torch.zeros(self.texts, dtype=torch.int64, device=device)
        self.given = torch.ones(self.texts, dtype=torch.int64, device=device)  # ids of each row that are the prompt's
        self.done = torch.ones(self.texts, dtype=torch.bool, device=device)
        self.counts = torch.zeros(self.texts, model.token_embd.shape[0], dtype=torch.uint8, device=device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)
        self.enter, self.leave, self.attend, self.sample = enter, leave, attend_plain, sample_plain
        if self.fast:
            self.enter = torch.compile(enter, dynamic=False)
            self.leave = torch.compile(leave, dynamic=False)
            self.attend, self.sample = attend_triton, sample_triton

    def logits(self) -> Tensor:
        """One position further for every text: [B, V]."""
        model = self.model
        x = F.embedding(self.ids[self.slots, self.positions], model.token_embd)
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            q = self.enter(
                x,
                layer.attn_norm,
                layer.attn_qkv,
                self.turn,
                self.slots,
                self.positions,
                keys,
                values,
                model.eps,
            )
            attended = self.attend(q, keys, values, self.positions)
            x = self.leave(x, attended, layer.attn_output, layer.ffn_norm, layer.ffn_gate_up, layer.ffn_down, model.eps)
        return F.linear(rms_norm(x, model.output_norm, model.eps), model.token_embd)

    def step(self) -> None:
        """Write one token in every text: the prompt's next, or one that is drawn."""
        manner, end = self.manner, self.model.vocabulary.end
        after = (self.positions + 1).clamp(max=self.length - 1)
        urge = ((after - self.given - manner.patience).clamp(min=0) * manner.urge).clamp(max=manner.urge_limit)
        drawn = self.sample(self.logits(), self.counts, urge, self.steps, end, manner)
        forced = after < self.given
        following = torch.where(forced | self.done, self.ids[self.slots, after], drawn)
        self.ids[self.slots, after] = following
        seen = self.counts[self.slots, following]
        self.counts[self.slots, following] = torch.where(forced, seen, (seen + 1).clamp(max=200))
        self.done |= ~forced & (following == end) | (after == self.length - 1)
        self.positions.copy_(torch.where(self.done, self.positions, after))
        self.steps += 1

    def graph(self) -> Callable[[], None]:
        """The step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            self.step()
        return captured.replay

    @torch.inference_mode()
    def write(
        self, prompts: Iterator[tuple[list[int], str]], shared: int, every: int = 8
    ) -> Iterator[list[tuple[str, list[int], bool]]]:
        """Yield, the texts that ended: the prompt's label, the ids after it, whether they were complete.

        The first `shared` ids must be the same in all prompts: their keys and values stay in the cache.
        Runs until its caller stops asking; every prompt must be shorter than the room a text has.
        """
        step = self.graph() if self.fast else self.step
        given, labels = [0] * self.texts, [""] * self.texts
        fresh = True
        while True:
            ended = self.done.nonzero().flatten().tolist()
            finished: list[tuple[str, list[int], bool]] = []
            if ended:
                at = torch.tensor(ended, device=self.ids.device)
                rows = self.ids[at].cpu().numpy()
                for slot, row in zip([] if fresh else ended, rows, strict=False):
                    body = row[given[slot] :]
                    stop = np.flatnonzero(body == self.model.vocabulary.end)
                    finished.append((labels[slot], (body[: stop[0]] if len(stop) else body).tolist(), len(stop) > 0))
                new = np.zeros((len(ended), self.length), np.int64)
                for i, slot in enumerate(ended):
                    prompt, labels[slot] = next(prompts)
                    given[slot] = len(prompt)
                    new[i, : len(prompt)] = prompt
                self.ids[at] = torch.from_numpy(new).to(at.device)
                self.given[at] = torch.tensor([given[slot] for slot in ended], device=at.device)
                self.positions[at] = 0 if fresh else shared
                self.counts[at] = 0
                self.done[at] = False
                fresh = False
            self.written += sum(len(ids) for _, ids, _ in finished)
            yield finished
            for _ in range(every):
                step()

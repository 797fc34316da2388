"""The expert kernels of this machine beside their references, all in one run on one model's weights.

For every number of tokens an expert: each tier's kernel; torch's bf16 or f16 linears, one expert after the other, as
the original Fiddler computes on its CPU; and plain reads of the same bytes, which no kernel can outrun for long. They
run in turn, each time on experts that have not been read for 4 times the last-level cache.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler import kernels
from fiddler.errors import RequestError, ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import expert_matrices
from fiddler.kernels import ExpertMatrices, KernelVariant, Tier
from fiddler.kernels.formats import FORMATS
from fiddler.kernels.machine.cpu import last_level_cache

__all__ = ["Row", "check_plot", "kernel_rows", "plot", "rows_to_markdown"]

_EXPERTS = 2  # at once, as one token of Mixtral has
_CACHES = 4  # multiples of the last-level cache to read before a byte is read again
_TOLERANCE = 5e-3  # relative to the result's norm: bf16 roundings may fall the other way
_PLAIN_READS = 2  # a round, of which the faster one counts

Experts = tuple[ExpertMatrices, ...]  # gate [N, F, D], up [N, F, D], down [N, D, F]: uint16 bits of N experts
Layer = Callable[[np.ndarray, Experts], np.ndarray]  # x [T, D], every token to every expert -> their mean [T, D]


@dataclass(frozen=True)
class Row:
    """A kernel or reference at one number of tokens an expert."""

    backend: str  # a kernel tier, "torch", or "reads"
    weights: str  # "bf16" or "f16"
    tokens: int  # an expert
    seconds: list[float]
    nbytes: int
    operations: int
    share_of_reads: float  # median over the rounds of its speed over that of plain reads in the same round
    speedup_over_torch: float  # likewise
    error: float | None  # against float64, relative to the result's norm

    @property
    def gb_per_second(self) -> float:
        """Weights read [GB/s], by the median."""
        return self.nbytes / median(self.seconds) / 1e9

    @property
    def gflops(self) -> float:
        """Multiplications and additions [GFLOP/s], by the median."""
        return self.operations / median(self.seconds) / 1e9

    def to_json(self) -> dict[str, Any]:
        """All fields, and both speeds."""
        return asdict(self) | {"gb_per_second": self.gb_per_second, "gflops": self.gflops}


def kernel_rows(
    model_file: ModelFile,
    tiers: Sequence[Tier],
    kinds: Sequence[str],
    tokens: Sequence[int],
    repetitions: int,
    threads: int | None = None,
) -> Iterator[Row]:
    """Measure the expert feed-forward on the model's own weights; `kinds` of "bf16" and "f16".

    Where the file has the other type, its bits are read as if they were of this one: the speed of instructions does
    not depend on values, as long as these are normal numbers, which trained weights are either way. Rows are ordered by
    kind and number of tokens, the plain reads first.
    Raises ResourceError where the model's experts are too few to keep them out of the cache, RequestError for none.
    """
    groups = _groups(model_file)
    nbytes = sum(bits.nbytes for each in groups[0] for bits in each)
    between, least = (len(groups) - 1) * nbytes, _CACHES * last_level_cache()
    if between < least:
        raise ResourceError(
            f"{model_file.file.shown_path}: between two reads of an expert lie {between / 1e6:.0f} MB of others; to "
            f"measure memory and not caches takes {least / 1e6:.0f} MB: give a larger model"
        )
    rotation = cycle(groups)
    kernels.set_threads(threads)
    torch.set_num_threads(kernels.thread_count())
    for experts in groups:
        _read(experts)  # every page is mapped
    width = groups[0][0].shape[2]
    for kind in kinds:
        layers: dict[str, Layer] = {"torch": _torch_layer(kind)}
        errors: dict[str, float | None] = {"torch": None}
        for tier in tiers:
            variant = KernelVariant(tier, kind, FORMATS[kind].partner)
            kernels.precompile(variant)
            layers[tier.name] = _kernel_layer(variant)
            errors[tier.name] = _error(layers[tier.name], variant, groups[0], tokens)
        for count in tokens:
            x = np.random.default_rng(count).standard_normal((count, width), dtype=np.float32)
            x *= np.float32(0.01)  # so that float16, where torch computes in it, does not overflow
            seconds: dict[str, list[float]] = {name: [] for name in ("reads", *layers)}
            for repetition in range(-1, repetitions):  # the first one does not count
                durations = {"reads": min(_read(next(rotation)) for _ in range(_PLAIN_READS))}
                for name, layer in layers.items():
                    experts, started = next(rotation), time.perf_counter()
                    layer(x, experts)
                    durations[name] = time.perf_counter() - started
                if repetition >= 0:
                    for name in seconds:
                        seconds[name].append(durations[name])
            # a multiplication and an addition of each weight
            operations = 2 * count * sum(bits.size for each in groups[0] for bits in each)
            for name, spent in seconds.items():
                of_reads = median(plain / own for plain, own in zip(seconds["reads"], spent, strict=True))
                speedup = median(reference / own for reference, own in zip(seconds["torch"], spent, strict=True))
                reads = name == "reads"
                yield Row(
                    name, kind, count, spent, nbytes, 0 if reads else operations, of_reads, speedup, errors.get(name)
                )


def _groups(model_file: ModelFile) -> list[Experts]:
    """The experts of all layers, a few neighbours in each group, as they lie in the mapping."""
    if not model_file.config.architecture.has_experts:
        raise RequestError(f"{model_file.file.shown_path} has no experts; --kernels measures them: leave it out")
    groups: list[Experts] = []
    for layer in model_file.config.sparse_layers:
        matrices, kinds = expert_matrices(model_file, layer)
        other = next((kind for kind in kinds if kind not in ("BF16", "F16")), None)
        if other is not None:
            raise RequestError(
                f"{model_file.file.shown_path} has {other} experts; --kernels compares 16-bit ones with torch: give an "
                "F16 or BF16 file, or leave it out"
            )
        for begin in range(0, len(matrices[0]) - _EXPERTS + 1, _EXPERTS):
            ids = range(begin, begin + _EXPERTS)
            groups.append(tuple(ExpertMatrices.of([each[expert] for expert in ids]) for each in matrices))
    return groups


def _read(experts: Experts) -> float:
    """Duration of plain reads of these weights [s]."""
    return sum(bits.nbytes / kernels.read_bandwidth(bits, 1) for each in experts for bits in each)


def _kernel_layer(variant: KernelVariant) -> Layer:
    def layer(x: np.ndarray, experts: Experts) -> np.ndarray:
        expert_ids = np.tile(np.arange(len(experts[0])), (len(x), 1))
        routing_weights = np.full(expert_ids.shape, 1 / expert_ids.shape[1], np.float32)
        gate, up, down = experts
        return kernels.expert_ffn(x, expert_ids, routing_weights, gate, up, down, variant)

    return layer


def _torch_layer(kind: str) -> Layer:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]

    def tensor(bits: np.ndarray) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
            return torch.from_numpy(bits).view(dtype)

    def layer(x: np.ndarray, experts: Experts) -> np.ndarray:
        with torch.inference_mode():
            inputs = torch.from_numpy(x).to(dtype)
            y = torch.zeros(x.shape)
            for gate, up, down in zip(*(map(tensor, each) for each in experts), strict=True):
                y += F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down).float() / len(experts[0])
            return y.numpy()

    return layer


def _error(layer: Layer, variant: KernelVariant, experts: Experts, tokens: Sequence[int]) -> float:
    """Largest error of a layer against a slow float64 computation, relative to its norm, over all numbers of tokens.

    Other numbers of tokens take other paths through a kernel; every token is the same one.
    Raises RuntimeError where the error is larger than roundings explain: the kernel computes something else.
    """
    gate, up, down = (each[0] for each in experts)
    first = tuple(ExpertMatrices.of([bits]) for bits in (gate, up, down))
    x = np.random.default_rng(0).standard_normal((1, gate.shape[1]), dtype=np.float32) * np.float32(0.01)
    rounded = variant.activations == "bf16"
    token = (_to_bf16(x[0]) if rounded else x[0]).astype(np.float64)
    g, u = _naive_product(gate, token, variant.weights), _naive_product(up, token, variant.weights)
    h = g / (1 + np.exp(-g)) * u
    expected = _naive_product(
        down, _to_bf16(h.astype(np.float32)).astype(np.float64) if rounded else h, variant.weights
    )
    norm = float(np.linalg.norm(expected))
    errors = [np.linalg.norm(layer(x.repeat(count, 0), first) - expected, axis=1).max() / norm for count in tokens]
    for count, error in zip(tokens, errors, strict=True):
        if not error < _TOLERANCE:
            raise RuntimeError(f"{variant}, {count} tokens: relative error {error:.1e} against float64")
    return float(max(errors))


def _naive_product(bits: np.ndarray, x: np.ndarray, kind: str) -> np.ndarray:
    """bits [N, K] . x [K] in float64, some rows at a time."""
    parts = []
    for begin in range(0, len(bits), 512):
        rows = bits[begin : begin + 512]
        wide = (rows.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else rows.view(np.float16)
        parts.append(wide.astype(np.float64) @ x)
    return np.concatenate(parts)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def rows_to_markdown(rows: Sequence[Row]) -> str:
    """A table of all rows: speeds by the median, their spread, and both ratios."""
    heads = ["weights", "tokens", "kernel", "ms", "min-max", "GB/s", "GFLOP/s", "of reads", "x torch", "error"]
    lines = ["| " + " | ".join(heads) + " |", "| --- | ---: | --- |" + " ---: |" * 7]
    for row in rows:
        milliseconds = [spent * 1e3 for spent in row.seconds]
        cells = [
            row.weights,
            str(row.tokens),
            row.backend,
            f"{median(milliseconds):.1f}",
            f"{min(milliseconds):.1f}-{max(milliseconds):.1f}",
            f"{row.gb_per_second:.1f}",
            f"{row.gflops:.0f}" if row.operations else "",
            f"{row.share_of_reads:.2f}" if row.operations else "",
            f"{row.speedup_over_torch:.2f}" if row.operations else "",
            "" if row.error is None else f"{row.error:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_plot() -> None:
    """Raise RequestError without matplotlib, which the extra `plot` installs."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RequestError("--plot needs matplotlib: pip install 'fiddler-moe[plot]'") from None


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG of tokens an expert against GFLOP/s, one line a kernel or reference, with the limit set by plain reads.

    Needs matplotlib: see `check_plot`.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.weights for row in rows))
    figure = Figure(figsize=(7 * len(kinds), 5), layout="constrained")
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), column + 1)
        of_kind = [row for row in rows if row.weights == kind]
        for backend in dict.fromkeys(row.backend for row in of_kind if row.operations):
            line = [row for row in of_kind if row.backend == backend]
            axes.plot([row.tokens for row in line], [row.gflops for row in line], marker="o", label=backend)
        reads = [row for row in of_kind if row.backend == "reads"]
        weights_per_byte = FORMATS[kind].block_length / FORMATS[kind].block_bytes
        # two operations a weight and token
        ceiling = [2 * row.gb_per_second * weights_per_byte * row.tokens for row in reads]
        axes.plot([row.tokens for row in reads], ceiling, "k--", label="plain reads")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        top = max(row.gflops for row in of_kind if row.operations)
        axes.set_ylim(top=3 * top)
        axes.set(title=f"{kind} weights", xlabel="tokens an expert", ylabel="GFLOP/s")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()

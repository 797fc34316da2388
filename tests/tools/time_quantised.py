"""Times the GPU's kernels for quantised experts of Mixtral-8x7B's shape beside those of bf16 ones. Needs a GPU.

`python tests/tools/time_quantised.py [TYPE ...] [--tiles] [--prompts]`: one token's experts, and one matrix, in
`exact` (float32) and in `fast` (int8); --tiles: in `fast` with several sizes of tiles; --prompts: also 16, 128 and 512
tokens. Weights are random bytes, of which the time does not depend.
"""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np
import torch

from fiddler import kernels
from fiddler.files.weights import ExpertWeights
from fiddler.gpu import block_gemv, decode_kernels, int8_activations, int8_gemv
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.gpu.int8_gemv import Tile, Tiles
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.formats import FORMATS
from fiddler.kernels.formats.triton_decoders import DOTS
from fiddler.offload.feed_forward import Job
from fiddler.offload.grouped_kernels import Grouped
from fiddler.offload.stored_matrix import StoredMatrix

EXPERTS, HIDDEN, WIDTH = 8, 14336, 4096
KINDS = "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_xs", "mxfp4"
RUNS, REPLAYS = 16, 15
TILES = [Tile(rows, 128, 4) for rows in (4, 2, 1, 8)] + [Tile(rows, 32, 4) for rows in (4, 2, 1)]
TILES += [Tile(4, 64, 4), Tile(2, 64, 2), Tile(2, 256, 8), Tile(1, 256, 8)]


class Layer:
    """Experts in the GPU's memory; those on the host nobody reads."""

    def __init__(self, kind, activations):
        shapes = (1, HIDDEN, WIDTH), (1, HIDDEN, WIDTH), (1, WIDTH, HIDDEN)
        self.kind, self.stored = kind, FORMATS[kind]
        stacks = [ExpertMatrices.of(np.empty(self.stored.stored_shape(s), self.stored.dtype)) for s in shapes]
        self.weights = ExpertWeights(*stacks, KernelVariant(kernels.choose_tier(), kind, activations))
        self.nbytes = self.weights.expert_bytes
        self.memory = torch.randint(0, 256, (EXPERTS, 3, self.nbytes // 3), dtype=torch.uint8, device="cuda")
        self.addresses = [[self.memory[e, m].data_ptr() for m in range(3)] for e in range(EXPERTS)]
        self.table = torch.tensor([[*at, HIDDEN, 0, 0] for at in self.addresses], device="cuda")
        self.x, self.y = torch.randn(1, WIDTH, device="cuda"), torch.zeros(1, WIDTH, device="cuda")
        self.shares = torch.ones(2, device="cuda")
        self.ids = [torch.tensor([i % EXPERTS, (i + 3) % EXPERTS], device="cuda") for i in range(EXPERTS)]

    def experts(self, i):
        """Two experts with one token."""
        ids = self.ids[i % EXPERTS]
        experts_of_one(self.x, self.table, self.shares, HIDDEN, self.weights, expert_ids=ids, into=self.y, add=True)

    def product(self, i, tile=None):
        """A matrix [HIDDEN, WIDTH] with one token, and what rounds this."""
        stored = self.memory[i % EXPERTS, i // EXPERTS % 2].view(HIDDEN, -1)
        if self.kind == "bf16":
            decode_kernels.gemv(self.x, stored.view(torch.bfloat16), rounded=True)
        elif self.weights.variant.int8_rows:
            int8_gemv.gemv(int8_activations.rounded(self.x), StoredMatrix(stored, self.stored), None, tile)
        else:
            block_gemv.gemv(self.x, stored, self.stored)


def seconds(run):
    """Of one run, the median of replays of a graph with several, each with other experts, as decode steps have it."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(RUNS):
            run(i)
    return median(timed(graph.replay) for _ in range(REPLAYS)) / RUNS


def timed(run):
    """By the GPU's clock."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def of_prompts(layer):
    """Seconds of all experts with 16, 128 and 512 tokens each."""
    grouped, device, found = Grouped(torch.device("cuda"), 384 << 20), "cuda", []
    for tokens in (16, 128, 512):
        inputs = torch.randn(tokens, WIDTH, device=device).bfloat16()
        token = torch.arange(tokens, device=device).repeat(EXPERTS)
        out, ones = torch.zeros(tokens, WIDTH, device=device), torch.ones(tokens * EXPERTS, device=device)
        jobs = [Job(tuple(at), HIDDEN, e * tokens, (e + 1) * tokens) for e, at in enumerate(layer.addresses)]
        arguments = inputs, token, ones, jobs, HIDDEN, out, 1 << 27, layer.weights
        samples = [timed(lambda a=arguments: grouped.experts_of_many(*a)) for _ in range(REPLAYS + 3)]
        found.append(f"{tokens} tokens of 8 {median(samples[3:]) * 1e3:.2f} ms")
    return "; ".join(found)


def copying():
    """Seconds of a copy of 1 GiB."""
    source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return seconds(lambda i: target.copy_(source))


def rate(nbytes, time):
    return f"{time * 1e6:6.1f} us {nbytes / time / 1e9:5.0f} GB/s"


def unlike(columns, kind):
    """The tiles, less those that give the same programs for rows of so many columns."""
    return {(*int8_gemv.shape_of(tile, columns // DOTS[kind].unit), tile.warps): tile for tile in TILES[::-1]}.values()


def compare_tiles(layer):
    """The fastest for wide rows by the product of one matrix, then for down by whole experts."""
    found = {tile: seconds(lambda i, tile=tile: layer.product(i, tile)) for tile in unlike(WIDTH, layer.kind)}
    for tile, time in found.items():
        print(f"  gemv {tuple(tile)}: {rate(layer.nbytes / 3, time)}", flush=True)
    wide, usual = min(found, key=found.get), int8_gemv.TILES[layer.kind]
    for tile in unlike(HIDDEN, layer.kind):
        int8_gemv.TILES[layer.kind] = Tiles(wide, tile)
        time = seconds(layer.experts)
        print(f"  experts, up {tuple(wide)}, down {tuple(tile)}: {rate(2 * layer.nbytes, time)}", flush=True)
    int8_gemv.TILES[layer.kind] = usual


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="TYPE")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--prompts", action="store_true")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; copying: {rate(2 << 30, copying())}", flush=True)
    x = torch.randn(1, WIDTH, device="cuda")
    print(f"rounding {WIDTH} activations: {seconds(lambda i: int8_activations.rounded(x)) * 1e6:.1f} us", flush=True)
    for kind in options.kinds:
        for activations in ("bf16",) if kind == "bf16" else ("f32", "q8"):
            layer = Layer(kind, activations)
            one, product = seconds(layer.experts), seconds(layer.product)
            name = {"bf16": "fast", "f32": "exact", "q8": "fast"}[activations]
            print(
                f"{kind} {name}: 2 experts {rate(2 * layer.nbytes, one)}; gemv {rate(layer.nbytes / 3, product)}",
                flush=True,
            )
            if options.prompts:
                print(f"  {of_prompts(layer)}", flush=True)
            if options.tiles and activations == "q8":
                compare_tiles(layer)
            del layer


if __name__ == "__main__":
    main()

"""Times the GPU's kernels for quantised experts of Mixtral-8x7B's shape beside those of bf16 ones. Needs a GPU.

`python tests/tools/time_quantised.py [TYPE ...]`; weights are random bytes, of which the time does not depend.
"""

from __future__ import annotations

import sys
from statistics import median

import numpy as np
import torch

from fiddler import kernels
from fiddler.files.weights import ExpertWeights
from fiddler.gpu.decode_kernels import gemv
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.formats import FORMATS
from fiddler.offload.feed_forward import Job
from fiddler.offload.grouped_kernels import Grouped

EXPERTS, HIDDEN, WIDTH = 8, 14336, 4096
KINDS = "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_xs", "mxfp4"
RUNS = 40


def weights_of(kind):
    """The layer, whose host memory nobody reads."""
    shapes = (1, HIDDEN, WIDTH), (1, HIDDEN, WIDTH), (1, WIDTH, HIDDEN)
    stored = FORMATS[kind]
    stacks = [ExpertMatrices.of(np.empty(stored.stored_shape(shape), stored.dtype)) for shape in shapes]
    variant = KernelVariant(kernels.choose_tier(), kind, "bf16" if kind == "bf16" else "q8")
    return ExpertWeights(*stacks, variant)


def seconds(run):
    """Median of several runs, each with other experts, by the GPU's clock."""
    samples = []
    for i in range(RUNS + 5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run(i)
        ended.record()
        ended.synchronize()
        samples.append(begun.elapsed_time(ended) / 1e3)
    return median(samples[5:])


def times(kind):
    """Seconds of two experts with one token, and of all with 16, 128 and 512 each; of a gemv."""
    w, device = weights_of(kind), torch.device("cuda")
    size = w.expert_bytes // 3
    memory = torch.randint(0, 256, (EXPERTS, 3, size), dtype=torch.uint8, device=device)
    addresses = [[memory[e, m].data_ptr() for m in range(3)] for e in range(EXPERTS)]
    table = torch.tensor([[*at, HIDDEN, 0, 0] for at in addresses], device=device)
    x, y, shares = torch.randn(1, WIDTH, device=device), torch.zeros(1, WIDTH, device=device), torch.ones(2).to(device)
    ids = [torch.tensor([i % EXPERTS, (i + 3) % EXPERTS], device=device) for i in range(RUNS + 5)]
    found = [seconds(lambda i: experts_of_one(x, table, shares, HIDDEN, w, expert_ids=ids[i], into=y, add=True))]
    grouped = Grouped(device)
    for tokens in (16, 128, 512):
        inputs = torch.randn(tokens, WIDTH, device=device).bfloat16()
        token = torch.arange(tokens, device=device).repeat(EXPERTS)
        out, ones = torch.zeros(tokens, WIDTH, device=device), torch.ones(tokens * EXPERTS, device=device)
        jobs = [Job(tuple(at), HIDDEN, e * tokens, (e + 1) * tokens) for e, at in enumerate(addresses)]
        arguments = inputs, token, ones, jobs, HIDDEN, out, 1 << 27, w
        found.append(seconds(lambda i, arguments=arguments: grouped.experts_of_many(*arguments)))
    if kind == "bf16":
        matrices = memory[:, 0].view(torch.bfloat16).view(EXPERTS, HIDDEN, WIDTH)
        found.append(seconds(lambda i: gemv(x, matrices[i % EXPERTS], rounded=True)))
    else:
        from fiddler.gpu import block_gemv

        stored = memory[:, 0].view(EXPERTS, HIDDEN, -1)
        found.append(seconds(lambda i: block_gemv.gemv(x, stored[i % EXPERTS], FORMATS[kind])))
    return w.expert_bytes, found


def main():
    first = None
    for kind in sys.argv[1:] or KINDS:
        nbytes, found = times(kind)
        first = first or found
        one, *many, product = found
        print(
            f"{kind}: 1 token, 2 experts {one * 1e6:.0f} us ({2 * nbytes / one / 1e9:.0f} GB/s, "
            f"{first[0] / one:.2f} times the speed of the first); "
            + ", ".join(f"{t} tokens of 8 {s * 1e3:.2f} ms" for t, s in zip((16, 128, 512), many, strict=True))
            + f"; gemv {product * 1e6:.0f} us ({nbytes / 3 / product / 1e9:.0f} GB/s)",
            flush=True,
        )


if __name__ == "__main__":
    main()

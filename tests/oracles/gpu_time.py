"""How long work takes on a GPU, without the time that Python takes to queue it."""

from __future__ import annotations

import time

import torch


def replayed(work):
    """Seconds of `work` in a graph, the least of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph, seconds = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(20):
            work()
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / 20)
    return min(seconds)

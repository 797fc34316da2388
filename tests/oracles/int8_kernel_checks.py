"""Checks of the Triton kernels that multiply int8, on a GPU or, with the device "cpu", in Triton's interpreter.

The oracle rounds activations in numpy, as `matmul/int8_activations.py` says, and multiplies them in float64 by the
weights that `gguf` dequantises. Importing it needs Triton. Each check raises AssertionError where a value is wrong.
"""

from __future__ import annotations

import numpy as np
import torch

from fiddler.gpu import block_gemv, decode_kernels, int8_activations, int8_gemv
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.gpu.layers import GpuLinear
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.offload.expert_biases import JobBiases
from fiddler.offload.stored_matrix import StoredMatrix
from oracles.block_kernel_checks import OnDevice, inputs_of
from oracles.quantised_layers import dequantised, quantised_layer

__all__ = ["check_experts", "check_gemv", "check_hidden", "check_linear", "check_rounding", "rounded"]


def rounded(x):
    """x [..., K] float32, rounded to 127ths of the largest magnitude of each 32 and back, float64."""
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(all="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(127) / largest)
        codes = np.rint(groups * inverse)
        codes = np.where(np.isnan(codes), 0, codes)
        return (codes.astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)


def check_rounding(device, columns=2080):
    """Every code and scale, in their places; NaN and infinities make a scale that is no number, or infinite."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, columns)).astype(np.float32)
    x[0, :32], x[0, 33:64], x[0, 64:96] = 0, 1e-3, np.arange(32) - 15.5
    x[0, 100], x[0, 150], x[0, 200], x[0, 201] = np.nan, np.inf, -np.inf, np.nan
    codes, scales = _read(int8_activations.rounded(torch.from_numpy(x).to(device)), columns)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal((codes * scales[:, None]).reshape(-1), rounded(x)[0])
    assert not np.isfinite(scales[[3, 4, 6]]).any()
    assert np.isfinite(np.delete(scales, [3, 4, 6])).all()


def _read(memory, columns):
    """Codes [K / 32, 32] and scales [K / 32], float64, of rounded activations in a device's memory."""
    planes, groups = int8_activations.planes_of(columns), columns // 32
    memory = memory.cpu().numpy()
    codes = memory[: planes * 64].view(np.int8).reshape(2, 2, planes, 16).transpose(2, 0, 1, 3).reshape(-1, 32)
    return codes[:groups].astype(np.float64), memory[planes * 64 :].view(np.float32)[:groups].astype(np.float64)


def check_hidden(device, rows=(96, 0, 544), max_rows=544):
    """Jobs with unlike numbers of rows: biases added, activations clamped, and rounded to a code, or the next one."""
    rng = np.random.default_rng(3)
    sums, biases = (4 * rng.normal(size=shape).astype(np.float32) for shape in ((3, 2, max_rows), (2, 2000)))
    jobs = torch.tensor([[0, 0, 0, count, 0, 300 * j] for j, count in enumerate(rows)], device=device)
    on_device = [torch.from_numpy(each).to(device) for each in (sums, *biases)]
    for clamped in (False, True):
        memory = int8_activations.rounded_hidden(jobs, None, on_device[0], tuple(on_device[1:]), clamped=clamped)
        for j, count in enumerate(rows):
            g, u = (sums[j, m, :count] + biases[m, 300 * j :][:count] for m in range(2))
            if clamped:
                expected = np.minimum(g, 7.0) / (1 + np.exp(-1.702 * np.minimum(g, 7.0))) * (np.clip(u, -7.0, 7.0) + 1)
            else:
                expected = g / (1 + np.exp(-g.astype(np.float64))) * u
            codes, scales = _read(memory[j], max_rows)
            actual = (codes * scales[:, None]).reshape(-1)[:count]
            error = np.abs(actual - rounded(expected.astype(np.float32)))
            assert (error <= 4e-6 * np.abs(expected) + _steps_in_doubt(expected)).all(), (clamped, j)


def check_gemv(kind, device, rows=7, columns=768):
    """One token's product matches the oracle; none is finite where an activation is not."""
    rng, kind_of = np.random.default_rng(1), BLOCK_FORMATS[kind]
    stored = kind_of.encode(rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1))))
    x, onto = rng.normal(size=(1, columns)).astype(np.float32), rng.normal(size=(1, rows)).astype(np.float32)
    weights = dequantised(stored, kind)
    expected, scale = rounded(x) @ weights.T, np.abs(rounded(x)) @ np.abs(weights).T
    w = StoredMatrix(torch.from_numpy(np.ascontiguousarray(stored)).to(device), kind_of)
    assert int8_gemv.multiplies(w)
    for tile in (None, int8_gemv.Tile(2, 32, 1)):
        a = int8_activations.rounded(torch.from_numpy(x).to(device))
        y = int8_gemv.gemv(a, w, tile=tile).cpu().numpy()
        assert (np.abs(y - expected) <= 1e-6 * scale).all(), (kind, tile)
        y = int8_gemv.gemv(a, w, torch.from_numpy(onto).to(device), tile).cpu().numpy()
        assert (np.abs(y - expected - onto) <= 2e-6 * scale).all(), (kind, tile)
    for value in (np.nan, np.inf, -np.inf):
        x[0, -3] = value
        a = int8_activations.rounded(torch.from_numpy(x).to(device))
        assert not int8_gemv.gemv(a, w).isfinite().any(), (kind, value)


def check_linear(device, kinds=("q4_k", "q8_0", "iq4_nl"), columns=512):
    """In `fast` a model's products are those of int8 where a matrix begins at 16 bytes; in `exact` those of float32."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.normal(size=(1, columns)).astype(np.float32)).to(device)
    stored = {kind: torch.from_numpy(BLOCK_FORMATS[kind].encode(rng.normal(size=(3, columns)))) for kind in kinds}
    weights = {kind: StoredMatrix(each.to(device), BLOCK_FORMATS[kind]) for kind, each in stored.items()}
    in_float32 = [block_gemv.gemv(x, each.stored, each.format) for each in weights.values()]
    a = int8_activations.rounded(x)
    in_int8 = [int8_gemv.gemv(a, weights[kind]) for kind in kinds]
    for exact in (False, True):
        linear = GpuLinear(weights, decode_kernels, exact=exact)
        for kind, together, int8, float32 in zip(kinds, linear.together(x, kinds), in_int8, in_float32, strict=True):
            expected = float32 if exact else int8
            assert torch.equal(together, expected), (kind, exact)
            assert torch.equal(linear(x, kind), expected), (kind, exact)
            assert not torch.equal(int8, float32), kind
    shifted = torch.cat([torch.zeros(2, dtype=torch.uint8), stored["q8_0"].flatten()]).to(device)[2:].view(3, -1)
    weights["elsewhere"] = StoredMatrix(shifted, BLOCK_FORMATS["q8_0"])
    assert torch.equal(GpuLinear(weights, decode_kernels, exact=False)(x, "elsewhere"), in_float32[1])


def check_experts(kinds, device, shape=(3, 512, 256), begin=256):
    """One token's experts, resident and streamed, of whole experts and of their hidden rows from `begin` on."""
    w = quantised_layer(kinds, "q8", shape)
    on_device, (x, expert_ids, routing_weights) = OnDevice(w, device), inputs_of(w, 1, 2)
    table = torch.tensor([[*on_device.addresses(e), w.shape[1], 0, 0] for e in range(w.shape[0])], device=device)
    tensors = [torch.from_numpy(array).to(device) for array in (x, expert_ids, routing_weights)]
    into = torch.ones(1, w.shape[2], device=device)

    def run(jobs, ids, rows, *, add, biases=None):
        shares = tensors[2].reshape(-1)
        experts_of_one(tensors[0], jobs, shares, rows, w, expert_ids=ids, into=into, add=add, biases=biases)
        return into.cpu().numpy()

    expected, bound = _of_rows(w, 0, x, expert_ids, routing_weights)
    assert (np.abs(run(table, tensors[1], w.shape[1], add=True) - 1 - expected) <= bound + 1e-6).all()
    assert (np.abs(run(table, tensors[1], w.shape[1], add=False) - expected) <= bound).all()
    none, down = torch.zeros(w.shape[1], device=device), torch.randn(w.shape[0], w.shape[2]).to(device)
    biased = run(table, tensors[1], w.shape[1], add=False, biases=JobBiases(none, none, down))
    of_down = routing_weights.astype(np.float64) @ down.cpu().numpy()[expert_ids[0]]
    assert (np.abs(biased - expected - of_down) <= bound + 1e-6).all()
    # the last rows of both experts, streamed; the last job has none
    jobs = [[*on_device.addresses(e, begin), w.shape[1] - begin, j, 0] for j, e in enumerate(expert_ids[0].tolist())]
    part = run(torch.tensor([*jobs, [0] * 6], device=device), None, w.shape[1] - begin, add=False)
    expected, bound = _of_rows(w, begin, x, expert_ids, routing_weights)
    assert (np.abs(part - expected) <= bound).all()
    tensors[0][0, 7] = torch.nan
    assert not np.isfinite(run(table, tensors[1], w.shape[1], add=False)).any()


def _steps_in_doubt(h):
    """The step of codes for hidden activations so near to the middle of two that float32 may choose the other one.

    An exponential of a GPU is wrong by some 1e-6, as its argument is (up to 15): that is 127 times as much of a step.
    """
    groups = h.reshape(-1, 32)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    return np.where(np.abs(np.abs(groups / step) % 1 - 0.5) < 1e-3, step, 0).reshape(h.shape)


def _of_rows(w, begin, x, expert_ids, routing_weights):
    """What the hidden rows from `begin` on add up to, [1, D] float64; and how far from that the kernels may be."""
    y, bound = np.zeros(x.shape), np.zeros(x.shape)
    for e, weight in zip(expert_ids[0].tolist(), routing_weights[0].tolist(), strict=True):
        stored = zip((w.gate, w.up, w.down), w.matrix_formats, strict=True)
        gate, up, down = (dequantised(matrices[e], kind.name) for matrices, kind in stored)
        g = rounded(x)[0] @ gate[begin:].T
        h = g / (1 + np.exp(-g)) * (rounded(x)[0] @ up[begin:].T)
        y[0] += weight * (rounded(h) @ down[:, begin:].T)
        bound[0] += weight * ((2e-6 * np.abs(rounded(h)) + _steps_in_doubt(h)) @ np.abs(down[:, begin:]).T)
    return y, bound

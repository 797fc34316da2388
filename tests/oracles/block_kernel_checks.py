"""Checks of the Triton kernels for quantised weights, on a GPU or, with the device "cpu", in Triton's interpreter.

Importing it needs Triton. Each check raises AssertionError where a value is wrong.
"""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import torch

from fiddler.gpu.block_gemv import gemv
from fiddler.gpu.expert_kernels import experts_of_one
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.offload.block_kernels import decode_rows
from fiddler.offload.feed_forward import Job, tokens_by_expert
from fiddler.offload.grouped_kernels import Grouped
from oracles.quantised_layers import dequantised, experts_in_float64, quantised_layer

__all__ = ["OnDevice", "check_decoder", "check_experts_of_many", "check_experts_of_one", "check_gemv", "inputs_of"]


def check_decoder(kind, device, rows=8, columns=768):
    """Every bit of random blocks is as `gguf` computes it, scales of NaN and infinity included."""
    row_bytes = BLOCK_FORMATS[kind].row_bytes(columns)
    stored = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about NaN and infinite scales
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind.upper()])
    actual = decode_rows(torch.from_numpy(stored).to(device), kind, torch.float32).cpu().numpy()
    assert actual.shape == expected.shape == (rows, columns)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    ids = [rows - 1, 0, 0]
    some = decode_rows(torch.from_numpy(stored).to(device), kind, torch.float32, torch.tensor(ids, device=device))
    np.testing.assert_array_equal(some.cpu().numpy(), actual[ids])


def check_gemv(kind, device, rows=7, columns=768):
    """One token's product matches float64."""
    rng, kind_of = np.random.default_rng(1), BLOCK_FORMATS[kind]
    stored = kind_of.encode(rng.normal(size=(rows, columns)))
    x, onto = rng.normal(size=(1, columns)).astype(np.float32), rng.normal(size=(1, rows)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantised(stored, kind).T
    on_device = [torch.from_numpy(array).to(device) for array in (x, stored, onto)]
    scale = np.abs(x) @ np.abs(dequantised(stored, kind)).T
    assert (np.abs(gemv(*on_device[:2], kind_of).cpu().numpy() - expected) <= 1e-6 * scale).all()
    assert (np.abs(gemv(*on_device[:2], kind_of, on_device[2]).cpu().numpy() - expected - onto) <= 2e-6 * scale).all()


class OnDevice:
    """A layer's experts in a device's memory, and their hidden rows from `begin` on."""

    def __init__(self, w, device):
        self.w, (self.experts, self.hidden, self.width), self._device = w, w.shape, device
        self._memory = []  # kept: jobs hold addresses

    def addresses(self, e, begin=0):
        down_from = self.w.matrix_formats[2].row_bytes(begin) if self.w.quantised else begin
        parts = self.w.gate[e][begin:], self.w.up[e][begin:], self.w.down[e][:, down_from:]
        tensors = [torch.from_numpy(np.ascontiguousarray(part)).to(self._device) for part in parts]
        self._memory += tensors
        return tuple(tensor.data_ptr() for tensor in tensors)


def inputs_of(w, tokens, k):
    """x [T, D], expert_ids and routing_weights [T, K]."""
    experts, _, width = w.shape
    rng = np.random.default_rng(2)
    expert_ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], np.int64)
    return rng.normal(size=(tokens, width)).astype(np.float32), expert_ids, rng.random((tokens, k)).astype(np.float32)


def check_experts_of_one(kinds, device, shape=(3, 512, 256), begin=256):
    """One token's experts, resident and streamed, of whole experts and of their hidden rows from `begin` on."""
    w = quantised_layer(kinds, "f32", shape)
    on_device, (x, expert_ids, routing_weights) = OnDevice(w, device), inputs_of(w, 1, 2)
    expected = experts_in_float64(w, x, expert_ids, routing_weights)
    table = torch.tensor([[*on_device.addresses(e), w.shape[1], 0, 0] for e in range(w.shape[0])], device=device)
    tensors = [torch.from_numpy(array).to(device) for array in (x, expert_ids, routing_weights)]
    into = torch.ones(1, w.shape[2], device=device)

    def run(jobs, ids, rows, *, add):
        experts_of_one(tensors[0], jobs, tensors[2].reshape(-1), rows, w, expert_ids=ids, into=into, add=add)
        return into.cpu().numpy()

    bound = 1e-5 * np.abs(expected).max()
    assert np.abs(run(table, tensors[1], w.shape[1], add=True) - 1 - expected).max() <= bound
    assert np.abs(run(table, tensors[1], w.shape[1], add=False) - expected).max() <= bound
    # the last rows of both experts, streamed; the last job has none
    jobs = [[*on_device.addresses(e, begin), w.shape[1] - begin, j, 0] for j, e in enumerate(expert_ids[0].tolist())]
    part = run(torch.tensor([*jobs, [0] * 6], device=device), None, w.shape[1] - begin, add=False)
    np.testing.assert_allclose(part, _of_rows(w, begin, x, expert_ids, routing_weights), atol=bound)


def _of_rows(w, begin, x, expert_ids, routing_weights):
    """`experts_in_float64` of the hidden rows from `begin` on."""
    y = np.zeros(x.shape)
    for e, weight in zip(expert_ids[0].tolist(), routing_weights[0].tolist(), strict=True):
        stored = zip((w.gate, w.up, w.down), w.matrix_formats, strict=True)
        gate, up, down = (dequantised(matrices[e], kind.name) for matrices, kind in stored)
        g = x[0] @ gate[begin:].T
        y[0] += weight * ((g / (1 + np.exp(-g)) * (x[0] @ up[begin:].T)) @ down[:, begin:].T)
    return y


def check_experts_of_many(kinds, device, dtype, tokens, shape=(3, 512, 256), begin=256, decoded_bytes=0):
    """Several tokens' experts, whole and in two parts, with products of 16 bits."""
    w = quantised_layer(kinds, "f32", shape)
    on_device, inputs = OnDevice(w, device), inputs_of(w, tokens, 2)
    x, expert_ids, routing_weights = inputs
    expected = experts_in_float64(w, *inputs)
    _, first = tokens_by_expert(expert_ids, w.shape[0])
    order = np.argsort(expert_ids.reshape(-1), kind="stable")
    token, weights = order // expert_ids.shape[1], routing_weights.reshape(-1)[order]
    token, weights = torch.from_numpy(token).to(device), torch.from_numpy(weights).to(device)
    y, grouped = torch.zeros(tokens, w.shape[2], device=device), Grouped(torch.device(device), decoded_bytes)
    if decoded_bytes:
        grouped.tiled = 1  # more tokens are decoded beforehand
    inputs16 = torch.from_numpy(x).to(device).to(dtype)
    used = [e for e in range(w.shape[0]) if first[e + 1] > first[e]]
    for workspace_bytes in (1 << 30, 2 * w.shape[1] * 5):  # at once, and five tokens at a time
        jobs = [Job(on_device.addresses(e), w.shape[1], int(first[e]), int(first[e + 1])) for e in used]
        y.zero_()
        grouped.experts_of_many(inputs16, token, weights, jobs, w.shape[1], y, workspace_bytes, w)
        error = np.linalg.norm(y.cpu().numpy() - expected) / np.linalg.norm(expected)
        assert 0 < error < (2e-3 if dtype == torch.float16 else 1e-2), error
    # the last rows alone, compared for the first token
    jobs = [Job(on_device.addresses(e, begin), w.shape[1] - begin, int(first[e]), int(first[e + 1])) for e in used]
    part = torch.zeros_like(y)
    grouped.experts_of_many(inputs16, token, weights, jobs, w.shape[1] - begin, part, 1 << 30, w)
    total = _of_rows(w, begin, x[:1], expert_ids[:1], routing_weights[:1])[0]
    error = np.linalg.norm(part[0].cpu().numpy() - total) / np.linalg.norm(total)
    assert error < (2e-3 if dtype == torch.float16 else 1e-2), error

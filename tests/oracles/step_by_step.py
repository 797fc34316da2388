"""A decode step by separate kernel calls, which the compiled step must equal bit by bit."""

from __future__ import annotations

import dataclasses

import numpy as np

from fiddler import kernels

__all__ = ["one_by_one", "with_gpt_oss_parts"]


def with_gpt_oss_parts(rng, blocks, head_dim):
    """The blocks with sinks, and with biases of attention's output, the router and the experts."""

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    for block in blocks:
        heads, width = len(block.attn_q) // head_dim, len(block.attn_output)
        experts = {
            name: dataclasses.replace(getattr(block, name), bias=floats(*getattr(block, name).shape[:2]))
            for name in ("gate", "up", "down")
        }
        small = {"sinks": floats(heads), "output_bias": floats(width), "router_bias": floats(len(block.ffn_gate_inp))}
        yield dataclasses.replace(block, **experts, **small)


def one_by_one(
    blocks, output_norm, output, variant, frequencies, experts_used, windows, x, pool, tables, positions, epsilon
):
    """The model's operations in the paper's order, each by its own function of `fiddler.kernels`."""
    h, head_dim = x, 2 * len(frequencies)
    for (layer, block), window in zip(enumerate(blocks), windows, strict=True):
        sinks, router_bias = (None if not each.size else each for each in (block.sinks, block.router_bias))
        x = kernels.rms_norm(h, block.attn_norm, epsilon)
        q, k, v = kernels.linears(x, [block.attn_q, block.attn_k, block.attn_v], variant)
        q, k, v = (part.reshape(len(h), -1, head_dim) for part in (q, k, v))
        attended = kernels.attend_each(q, k, v, pool, layer, tables, positions, frequencies, window, sinks)
        added = kernels.linear(attended.reshape(len(h), -1), block.attn_output, variant)
        h = h + (added + block.output_bias if block.output_bias.size else added)
        x = kernels.rms_norm(h, block.ffn_norm, epsilon)
        chosen = kernels.route(x, block.ffn_gate_inp, experts_used, router_bias=router_bias)
        clamped = block.gate.bias is not None
        h = h + kernels.expert_ffn(x, *chosen, block.gate, block.up, block.down, variant, clamped=clamped)
    return h, kernels.linear(kernels.rms_norm(h, output_norm, epsilon), output, variant)

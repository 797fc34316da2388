"""Hidden activations of experts within Triton kernels. Knows numbers in registers; no weights."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["hidden_activation"]


@triton.jit
def hidden_activation(g, u, CLAMPED: tl.constexpr):  # Triton's own values
    """silu(g) * u; CLAMPED: g * sigmoid(1.702 g) * (u + 1), g at most 7, u between -7 and 7. NaN stays NaN."""
    if CLAMPED:
        g = tl.where(g > 7.0, 7.0, g)
        u = tl.where(u > 7.0, 7.0, tl.where(u < -7.0, -7.0, u))
        return g / (1 + tl.exp(-1.702 * g)) * (u + 1)
    return g / (1 + tl.exp(-g)) * u

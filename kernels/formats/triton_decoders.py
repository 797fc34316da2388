"""The Triton decoder of each quantised format that runs on a GPU. Needs Triton: imported where kernels are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

from fiddler.kernels.formats import GPU_FORMATS
from fiddler.kernels.formats.iq4_nl_triton import iq4_nl, iq4_nl_dot, iq4_xs, iq4_xs_dot
from fiddler.kernels.formats.mxfp4_triton import mxfp4, mxfp4_dot
from fiddler.kernels.formats.q4_0_triton import q4_0, q4_0_dot, q4_1, q4_1_dot
from fiddler.kernels.formats.q4_k_triton import q4_k, q4_k_dot
from fiddler.kernels.formats.q5_0_triton import q5_0, q5_0_dot, q5_1, q5_1_dot
from fiddler.kernels.formats.q5_k_triton import q5_k, q5_k_dot
from fiddler.kernels.formats.q6_k_triton import q6_k, q6_k_dot
from fiddler.kernels.formats.q8_0_triton import q8_0, q8_0_dot

__all__ = ["DECODERS", "DOTS", "Dot"]

_ALL = q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4
DECODERS: dict[str, Any] = {each.__name__: each for each in _ALL}
"""By the name of the format; see `triton_loads` for a decoder's arguments."""
assert DECODERS.keys() == GPU_FORMATS


class Dot(NamedTuple):
    """Products of a format with activations in int8."""

    function: Any
    """See `triton_words` for its arguments."""
    unit: int
    """Weights that one thread multiplies at a time."""


_UNITS_OF_32 = q4_0_dot, q4_1_dot, q5_0_dot, q5_1_dot, q6_k_dot, q8_0_dot, iq4_nl_dot, iq4_xs_dot, mxfp4_dot
DOTS = {each.__name__.removesuffix("_dot"): Dot(each, 32) for each in _UNITS_OF_32}
DOTS |= {"q4_k": Dot(q4_k_dot, 64), "q5_k": Dot(q5_k_dot, 64)}
"""By the name of the format."""
assert DOTS.keys() == DECODERS.keys()

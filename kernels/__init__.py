"""CPU kernels: expert feed-forwards and dense products from 16-bit weights where they lie, compiled by Numba.

Knows arrays and CPU features; not files, tensors or models. The functions here validate what they are given and
are the only doors to the compiled code, which has no bounds checks.
"""

from fiddler.kernels.attention import Kept, attend_each
from fiddler.kernels.bandwidth import read_bandwidth
from fiddler.kernels.cpu import TIERS, Tier, available_tiers, choose_tier
from fiddler.kernels.decode import Block, Decoder
from fiddler.kernels.expert_ffn import expert_ffn
from fiddler.kernels.linear import linear, linears
from fiddler.kernels.prepare import prepare
from fiddler.kernels.product import Product
from fiddler.kernels.routing import rms_norm, route
from fiddler.kernels.threads import set_threads, thread_count, threading_layer, usable_cores

__all__ = [
    "TIERS",
    "Block",
    "Decoder",
    "Kept",
    "Product",
    "Tier",
    "attend_each",
    "available_tiers",
    "choose_tier",
    "expert_ffn",
    "linear",
    "linears",
    "prepare",
    "read_bandwidth",
    "rms_norm",
    "route",
    "set_threads",
    "thread_count",
    "threading_layer",
    "usable_cores",
]

"""CPU kernels: expert feed-forwards and dense products, read from 16-bit weights in place, compiled by Numba.

Knows arrays and CPU features; not files, tensors or models. The compiled code has no bounds checks: the functions
here validate their arguments and are the only way in.
"""

from fiddler.kernels.attention import attend_each
from fiddler.kernels.bandwidth import read_bandwidth
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.decode import BlockParts, BlockWeights, CompiledDecodeStep
from fiddler.kernels.expert_ffn import ExpertFfn, expert_ffn
from fiddler.kernels.expert_matrices import ExpertMatrices
from fiddler.kernels.linear import linear, linears, per_expert, per_head
from fiddler.kernels.machine.isa import TIERS, Tier, available_tiers, choose_tier
from fiddler.kernels.machine.threads import set_threads, thread_count, threading_layer, usable_cores
from fiddler.kernels.norm_router import Routing, rms_norm, route
from fiddler.kernels.precompile import precompile
from fiddler.kernels.stored_rows import StoredRows, decode_stored

__all__ = [
    "TIERS",
    "BlockParts",
    "BlockWeights",
    "CompiledDecodeStep",
    "ExpertFfn",
    "ExpertMatrices",
    "KernelVariant",
    "Routing",
    "StoredRows",
    "Tier",
    "attend_each",
    "available_tiers",
    "choose_tier",
    "decode_stored",
    "expert_ffn",
    "linear",
    "linears",
    "per_expert",
    "per_head",
    "precompile",
    "read_bandwidth",
    "rms_norm",
    "route",
    "set_threads",
    "thread_count",
    "threading_layer",
    "usable_cores",
]

"""Which type each tensor of a quantised file has: llama-quantize's mixtures, by name. Pure; knows names and shapes.

The rules are those of llama.cpp's `llama_tensor_get_type_impl` and `tensor_type_fallback` (src/llama-quant.cpp, commit
0c1e570), for the architectures that fiddler knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fiddler.errors import RequestError, quoted
from fiddler.models.config import Config

__all__ = ["ALIASES", "MIXTURES", "Mixture", "mixture_of", "tensor_type"]


@dataclass(frozen=True)
class Mixture:
    """A kind of quantised file: the type of most matrices, and GGUF's number of the kind (`general.file_type`)."""

    name: str
    main: str
    file_type: int


MIXTURES: Mapping[str, Mixture] = {
    name: Mixture(name, main, number)
    for name, main, number in (
        ("Q4_0", "q4_0", 2),
        ("Q4_1", "q4_1", 3),
        ("Q8_0", "q8_0", 7),
        ("Q5_0", "q5_0", 8),
        ("Q5_1", "q5_1", 9),
        ("Q2_K", "q2_k", 10),
        ("Q3_K_S", "q3_k", 11),
        ("Q3_K_M", "q3_k", 12),
        ("Q3_K_L", "q3_k", 13),
        ("Q4_K_S", "q4_k", 14),
        ("Q4_K_M", "q4_k", 15),
        ("Q5_K_S", "q5_k", 16),
        ("Q5_K_M", "q5_k", 17),
        ("Q6_K", "q6_k", 18),
        ("IQ4_NL", "iq4_nl", 25),
        ("IQ4_XS", "iq4_xs", 30),
        ("MXFP4_MOE", "mxfp4", 38),
    )
}
"""llama-quantize's kinds of files whose types fiddler writes, by name."""
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Its other names of them. Its numbers are names, too."""

_NARROWER = {"iq4_xs": "iq4_nl", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Types with blocks of 256 -> the type in their place, with blocks of 32, where a row is no multiple of 256."""
_WEIGHTED_FIRST_DOWN = {"Q4_0": "q4_1", "Q5_0": "q5_1", "IQ4_NL": "iq4_nl", "IQ4_XS": "iq4_xs"}
"""By kind: the type of ffn_down in the first eighth of the layers, where an importance matrix changes it."""
_EIGHT_EXPERTS_OUTPUT = frozenset(("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"))
_VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight$")


def mixture_of(name: object) -> Mixture:
    """The mixture of a name, an alias or a number, in any case. Raises RequestError for another."""
    if isinstance(name, str) and len(name) < 20:
        upper = name.upper()
        found = MIXTURES.get(ALIASES.get(upper, upper))
        found = found or next((each for each in MIXTURES.values() if str(each.file_type) == name), None)
        if found is not None:
            return found
    raise RequestError(f"type is {quoted(name)}; there are {', '.join((*MIXTURES, *ALIASES))}")


def tensor_type(
    mixture: Mixture, name: str, shape: tuple[int, ...], config: Config, *, tied: bool, weighted: bool = False
) -> str:
    """The type of a matrix of the model, whose rows are `shape`'s last.

    tied: token_embd is the output matrix, too. weighted: the file is made with an importance matrix.
    """
    chosen = _wanted(mixture, name, shape, config, tied=tied)
    if weighted and "ffn_down" in name and int(name.split(".")[1]) < config.block_count // 8:
        chosen = _WEIGHTED_FIRST_DOWN.get(mixture.name, chosen)
    if chosen in _NARROWER and shape[-1] % 256:
        chosen = _NARROWER[chosen]
    return "f16" if shape[-1] % 32 else chosen


def _wanted(mixture: Mixture, name: str, shape: tuple[int, ...], config: Config, *, tied: bool) -> str:
    kind, main = mixture.name, mixture.main
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if kind == "MXFP4_MOE" or shape[-1] % (32 if main not in _NARROWER else 256):
            return "q8_0"
        return main if main == "q8_0" else "q6_k"
    if kind == "MXFP4_MOE":
        return "mxfp4" if len(shape) > 2 and shape[0] > 1 else "q8_0"
    if name == "token_embd.weight":
        return main
    layer = int(name.split(".")[1])
    if _VALUES.search(name):
        return _of_values(kind, main, layer, config)
    if name.endswith("attn_k.weight"):
        return "q8_0" if config.expert_count == 8 else main
    if "ffn_down" in name:
        return _of_down(kind, main, layer, config.block_count)
    if name.endswith("attn_output.weight"):
        if config.expert_count == 8:
            return "q5_k" if kind in _EIGHT_EXPERTS_OUTPUT else main
        return {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k"}.get(kind, main)
    return main


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _of_values(kind: str, main: str, layer: int, config: Config) -> str:
    shared = config.head_count // max(config.head_count_kv, 1) >= 4  # queries of a key and value head
    chosen = main
    if kind == "Q2_K":
        chosen = "q4_k" if shared else "q3_k"
    elif kind == "Q3_K_M":
        chosen = "q5_k" if layer < 2 else "q4_k"
    elif kind == "Q3_K_L" or (kind in ("IQ4_NL", "IQ4_XS") and shared) or (kind == "Q4_K_S" and layer < 4):
        chosen = "q5_k"
    elif kind in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, config.block_count):
        chosen = "q6_k"
    is_70b = config.architecture.gguf_name == "llama" and config.block_count == 80 and not config.expert_count
    if is_70b and config.head_count != config.head_count_kv and chosen in ("q3_k", "q4_k"):
        chosen = "q5_k"
    return "q8_0" if config.expert_count == 8 else chosen


def _of_down(kind: str, main: str, layer: int, layers: int) -> str:
    if kind == "Q2_K":
        return "q3_k"
    if kind == "Q3_K_M":
        return "q5_k" if layer < layers // 16 else "q4_k"
    if kind == "Q3_K_L":
        return "q5_k"
    if kind in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if _more_bits(layer, layers) else main
    if kind in ("IQ4_NL", "IQ4_XS", "Q4_K_S") and layer < layers // 8:
        return "q5_k"
    return main

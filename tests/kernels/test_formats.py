"""Weight formats as values: sizes against the `gguf` package's, decoding against numpy's and torch's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from numba import njit

from fiddler import kernels
from fiddler.kernels import KernelVariant
from fiddler.kernels.codegen.variant import WEIGHTS
from fiddler.kernels.formats import BLOCK_FORMATS, FORMATS, format_of, stored_bytes
from fiddler.kernels.formats.half import BF16, F16
from fiddler.kernels.matmul.outer_tiles import widen_row

TIERS = kernels.available_tiers()


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_a_row_takes_as_many_bytes_as_gguf_says(weight_format):
    kind = gguf.GGMLQuantizationType[weight_format.name.upper()]
    assert (weight_format.block_length, weight_format.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    for columns in (0, 256, 1536, 14336):
        assert (weight_format.row_bytes(columns),) == gguf.quant_shape_to_byte_shape((columns,), kind)


def test_a_row_that_is_no_whole_number_of_blocks_is_refused():
    blocks = BLOCK_FORMATS["q8_0"]
    assert blocks.row_bytes(4096) == 4352
    with pytest.raises(ValueError, match=r"4100 q8_0 weights.*multiple of 32"):
        blocks.row_bytes(4100)
    with pytest.raises(ValueError, match=r"4100 q8_0 weights.*multiple of 32"):
        blocks.encode(np.zeros((1, 4100), np.float32))


def test_every_variant_has_its_format():
    assert tuple(FORMATS) == WEIGHTS
    for name in WEIGHTS:
        assert format_of(KernelVariant(TIERS[0], name, "f32")) is FORMATS[name]
        KernelVariant(TIERS[0], name, FORMATS[name].partner)  # a pair that the kernels multiply


@njit
def _decode(variant, source, target, count):
    widen_row(variant, source, target, count, 0)


@njit
def _stored_bytes(variant, weights):
    return stored_bytes(variant, weights)


@pytest.mark.parametrize("tier", [TIERS[0], TIERS[-1]], ids=lambda tier: tier.name)
@pytest.mark.parametrize("weight_format", [BF16, F16], ids=lambda weight_format: weight_format.name)
def test_every_bit_pattern_decodes_to_its_number(weight_format, tier):
    bits = np.arange(1 << 16, dtype=np.uint16)[:-3]  # the last ones one by one, behind the last whole vector
    variant = KernelVariant(tier, weight_format.name, "f32")
    out = np.full(bits.size, 7, np.float32)
    _decode(variant, bits.ctypes.data, out.ctypes.data, bits.size)
    expected = bits.view(np.float16).astype(np.float32)
    if weight_format is BF16:
        expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(out, expected)
    assert _stored_bytes(variant, 96) == weight_format.row_bytes(96)

"""llama.cpp's types: what we decode is what gguf decodes, what its code encodes is near."""

from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch

from alphaquant.quant.ggml.decoding import decode
from alphaquant.quant.ggml.encoding import encode
from alphaquant.spaces.formats import GGML_BLOCKS, parse_format
from alphaquant.testing.llama.blocks import drawn_blocks

needs_library = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp (the extra llamacpp) is not installed"
)


@pytest.mark.parametrize("kind", GGML_BLOCKS)
def test_any_block_decodes_to_what_gguf_decodes(kind: str) -> None:
    blocks = drawn_blocks(kind)
    right = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(decode(kind, blocks).numpy(), right)


@pytest.mark.parametrize("kind", GGML_BLOCKS)
def test_sizes_of_blocks_are_those_of_gguf(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == GGML_BLOCKS[kind]


TABLES_OF_SECONDS = ("iq2_s", "iq2_xs", "iq2_xxs")
"""Types whose tables llama.cpp makes in seconds of its first call."""


@needs_library
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in TABLES_OF_SECONDS else kind
        for kind in GGML_BLOCKS
    ],
)
def test_encoded_weights_are_near_whatever_the_importance(kind: str) -> None:
    weight = 0.02 * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    allowed = 2 * 4.0 ** -(parse_format(kind).nominal_bits - 0.9)  # 0.4 at 2.06 bits
    for importance in (None, torch.zeros(512), torch.rand(512)):
        found = encode(kind, weight, importance)
        assert found.shape == (4, parse_format(kind).row_bytes(512))
        error = (decode(kind, found) - weight).square().sum() / weight.square().sum()
        assert error < allowed, (kind, float(error))


@needs_library
def test_important_columns_are_nearer() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(256)
    importance[::16] = 1000.0
    errors = [
        (decode("q2_k", encode("q2_k", weight, row)) - weight)[:, ::16].square().sum()
        for row in (None, importance)
    ]
    assert errors[1] < 0.6 * errors[0]

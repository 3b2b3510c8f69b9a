"""Blocks of llama.cpp's types hold the numbers of our formats, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from alphaquant.exports.gguf.twins import blocks_of, plain_twin, twin_of
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.spaces.formats import GGML_BLOCKS, GGML_REPLACED, GGML_TWINS, parse_format
from alphaquant.testing.formats import draw_weights

EXACT = {
    "int1-g128": "Q1_0",
    "int4-g32": "Q4_0",
    "int4-g64": "Q4_0",
    "int5-g32": "Q5_0",
    "int5-row": "Q5_0",
    "int8-g32": "Q8_0",
    "int8-g128": "Q8_0",
    "mxfp4": "MXFP4",
    "nl4-g32": "IQ4_NL",
    "nl4-g64": "IQ4_NL",
    "int3-g16-s256": "Q3_K",
    "nl4-g32-s256": "IQ4_XS",
}


def rounded(name: str, rows: int = 6, cols: int = 768) -> PackedMatrix:
    weight = draw_weights(rows, cols)[None]
    return quantize_rtn(weight, parse_format(name), "mse").pack(0, slice(None))


def decoded(packed: PackedMatrix, kind: str) -> np.ndarray:
    if kind == "Q1_0":  # gguf 0.19 does not decode it
        blocks = blocks_of(packed).view(packed.rows, -1, 18)
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        bits = np.unpackbits(blocks[..., 2:].numpy(), axis=-1, bitorder="little")
        return ((2.0 * bits - 1.0) * scale.numpy()).reshape(packed.rows, -1)
    return gguf.quants.dequantize(blocks_of(packed).numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("name", EXACT)
def test_a_type_decodes_to_what_our_format_stands_for(name: str) -> None:
    packed = rounded(name)
    twin = twin_of(packed.format, packed.cols)
    assert twin is not None and twin.name == EXACT[name]
    assert blocks_of(packed).shape == (packed.rows, twin.row_bytes(packed.cols))
    right = packed.dequantize().numpy()
    assert np.array_equal(decoded(packed, twin.name).astype(np.float32), right)


def test_two_bits_count_from_minus_one_under_the_negative_scale() -> None:
    packed = rounded("int2-g64")
    blocks = blocks_of(packed).view(packed.rows, -1, 18)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    codes = torch.stack([blocks[..., 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    values = (codes.float() - 1.0) * scale
    assert torch.equal(values.view(packed.rows, -1), packed.dequantize())


def test_the_example_of_the_header_is_made() -> None:
    codes = torch.arange(1, 33, dtype=torch.uint8) % 16
    nibbles = codes[::2] | codes[1::2] << 4  # our stream: neighbours share a byte
    tensors = {"codes": nibbles[None], "scales": torch.tensor([[0.5]], dtype=torch.float16)}
    found = blocks_of(PackedMatrix(parse_format("int4-g32"), 1, 32, tensors))
    assert found.flatten().tolist()[:5] == [0x00, 0x38, 0x11, 0x22, 0x33]
    one, two = int(codes[0]), int(codes[16])
    assert found[0, 2] == one | two << 4


def test_bfloat16_is_written_as_it_is() -> None:
    weight = draw_weights(4, 32)
    packed = pack_bf16(weight)
    assert torch.equal(blocks_of(packed).view(torch.bfloat16), weight.to(torch.bfloat16))
    assert plain_twin(torch.zeros(2, dtype=torch.float16)).name == "F16"


@pytest.mark.parametrize(
    ("name", "cols"),
    [
        ("int4-g32-asym", 256),  # zero points
        ("int3-g32", 256),  # no such type
        ("int4-g48", 192),  # blocks across two groups
        ("int4-g32", 80),  # a width that blocks do not divide
        ("int1-g128", 192),
        ("nvfp4", 256),
        ("nl4-g32-s256", 384),  # half a super-block
        *(("int3-g32-s256", 256), ("nl4-g16-s256", 256), ("nl3-g32", 256)),  # no such types
        ("fp8-e4m3-g128", 256),
    ],
)
def test_what_has_no_exact_twin_has_none(name: str, cols: int) -> None:
    assert twin_of(parse_format(name), cols) is None


@pytest.mark.parametrize(("theirs", "ours"), [*GGML_TWINS.items(), *GGML_REPLACED.items()])
def test_a_format_that_is_said_to_be_a_type_is_written_as_that_type(
    theirs: str, ours: str
) -> None:
    twin = twin_of(parse_format(ours), 768)
    assert twin is not None and twin.name == theirs.upper()
    assert 8 * twin.row_bytes(768) == parse_format(ours).storage_bits(1, 768)
    if theirs in GGML_REPLACED:
        assert (twin.block, twin.row_bytes(twin.block)) == GGML_BLOCKS[theirs]

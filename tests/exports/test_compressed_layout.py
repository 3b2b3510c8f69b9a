"""One matrix as compressed-tensors stores it, read by that package: the same numbers, bit for bit.

The exception is nvfp4, whose global scale is inverted: one rounding of float32.
"""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from alphaquant.exports.compressed_layout import compressed_tensors, scheme_of
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.kernels import pack_drawn

ROWS, COLS = 64, 256
INTEGERS = [
    *("int2-g64", "int2-g128-asym", "int3-g128", "int3-row", "int3-g32-asym", "int4-g32"),
    *("int4-g128-asym", "int5-g64", "int6-g128", "int6-row-asym", "int8-row", "int8-g32-asym"),
]


def quantized(name: str) -> PackedMatrix:
    return pack_drawn(name, ROWS, COLS)


def decompressed(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What the package makes of the tensors, in float32 where it goes by the scales' dtype."""
    scheme = QuantizationScheme(**{"targets": ["Linear"]} | scheme_of(parse_format(name)))
    official: Any = BaseCompressor.get_value_from_registry(scheme.format)
    given = dict(tensors)
    if given["weight_scale"].dtype == torch.float16:
        given["weight_scale"] = given["weight_scale"].float()
    found: Tensor = official.decompress(given, scheme)["weight"]
    return found


@pytest.mark.parametrize("name", [*INTEGERS, "fp8-e4m3-row"])
def test_the_package_reads_the_same_numbers(name: str) -> None:
    matrix = quantized(name)
    assert torch.equal(decompressed(name, compressed_tensors(matrix)), matrix.dequantize())


def test_mxfp4_is_the_same_in_bfloat16_which_holds_it() -> None:
    matrix = quantized("mxfp4")
    found = decompressed("mxfp4", compressed_tensors(matrix))
    assert torch.equal(found.float(), matrix.dequantize())


def test_nvfp4_is_the_same_but_for_the_inverse_of_one_scale() -> None:
    matrix = quantized("nvfp4")
    found = decompressed("nvfp4", compressed_tensors(matrix))
    # The package rounds to bfloat16; the inverse of the scale moves a number at the middle of two.
    expected = matrix.dequantize().bfloat16()
    step = expected.float().abs() * 2.0**-7
    assert ((found.float() - expected.float()).abs() <= step).all()
    assert (found == expected).float().mean() > 0.99


def test_three_bits_are_dense_and_zero_points_lie_along_the_outputs() -> None:
    tensors = compressed_tensors(quantized("int3-g64-asym"))
    assert tensors["weight_packed"].shape == (ROWS, COLS * 3 // 32)
    assert tensors["weight_zero_point"].shape == (ROWS * 3 // 32, COLS // 64)
    assert tensors["weight_shape"].tolist() == [ROWS, COLS]
    assert tensors["weight_scale"].dtype == torch.float16


def test_a_matrix_in_bf16_stays_as_it_is() -> None:
    assert set(compressed_tensors(quantized("bf16"))) == {"weight"}

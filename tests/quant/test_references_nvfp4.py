"""nvfp4 against published implementations, for one matrix under one global scale.

Both peers agree with the global scale amax / (448 * 6) and block scales E4M3(amax / 6 / global);
compressed-tensors keeps the global's inverse. They differ in three places, which the tests state:

    torchao multiplies by the reciprocal of the combined scale where a quotient is meant, so a
    number within a rounding error of a tie may go to its other side.
    torchao writes no block scale below 2^-6, here the least is 2^-9, E4M3's smallest number.
    compressed-tensors rounds inside the same arithmetic; its zeros lose their sign.
"""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.codecs import make_grid
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights

NVFP4 = parse_format("nvfp4")
ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    symmetric=True,
    strategy="tensor_group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
)
SIZES = [1.0, 1e-3, 3e4]


def draw_blocks(size: float) -> Tensor:
    """[N, K] with blocks of very different size, of zeros, and of ties."""
    weight = size * draw_weights(48, 160, seed=3)
    weight[1, :16] = 0.0
    weight[2, 16:32] = -0.0
    weight[3] *= 0.02  # block scales down to E4M3's coarse lower end
    weight[4, :16] = torch.arange(16) * 0.25 * size
    return weight


def pack(weight: Tensor) -> PackedMatrix:
    return quantize_rtn(weight[None], NVFP4, "minmax").pack(0, slice(None))


def codes_of(packed: PackedMatrix) -> Tensor:
    return unpack_codes(packed.tensors["codes"], 4, packed.cols)


@pytest.mark.parametrize("size", SIZES)
def test_scales_are_those_of_torchao(size: float) -> None:
    weight = draw_blocks(size)
    packed = pack(weight)
    shared = per_tensor_amax_to_scale(weight.abs().max())
    assert torch.equal(packed.tensors["global_scale"], shared.reshape(1))
    blocks, _ = nvfp4_quantize(weight, 16, shared)
    found, theirs = packed.tensors["scales"].float(), blocks.reshape(48, 10).float()
    assert torch.equal(found.clamp(min=2.0**-6), theirs)
    assert int((found < 2.0**-6).sum()) >= 2 and float(found.min()) == 2.0**-9


@pytest.mark.parametrize("size", SIZES)
def test_elements_are_those_of_torchao_but_for_the_sides_of_ties(size: float) -> None:
    weight = draw_blocks(size)
    packed = pack(weight)
    _, data = nvfp4_quantize(weight, 16, per_tensor_amax_to_scale(weight.abs().max()))
    theirs = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    scale = packed.tensors["scales"].float() * packed.tensors["global_scale"]
    scaled = weight / scale.repeat_interleave(16, -1)
    usual = (packed.tensors["scales"].float() >= 2.0**-6).repeat_interleave(16, -1)
    # Four float32 roundings lie between the two: 4 * 2^-24 of the quotient, which is at most 6.
    reach = 4 * 2.0**-24 * 6
    grid = make_grid(NVFP4)
    decided = grid.snap(scaled - reach) == grid.snap(scaled + reach)
    assert float((usual & decided).float().mean()) > 0.95
    assert torch.equal(codes_of(packed)[usual & decided], theirs[usual & decided])


@pytest.mark.parametrize("exponent", [-9, 0, 5])
def test_ties_and_ends_are_exactly_those_of_torchao_where_reciprocals_are(exponent: int) -> None:
    """The global scale and those of the last two blocks are powers of two."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    block = torch.cat([ties, ties * (1 - 2.0**-20)])
    largest = torch.zeros(16)
    largest[0] = 448 * 6.0  # makes the global scale 2^exponent
    row = torch.cat([largest, 256 * block, 32 * block]) * 2.0**exponent
    weight = torch.stack([row, -row])
    packed = pack(weight)
    assert float(packed.tensors["global_scale"]) == 2.0**exponent
    assert packed.tensors["scales"].float().tolist() == [[448.0, 256.0, 32.0]] * 2
    _, data = nvfp4_quantize(weight, 16, per_tensor_amax_to_scale(weight.abs().max()))
    assert torch.equal(packed.tensors["codes"], data)


@pytest.mark.parametrize("size", SIZES)
def test_scales_are_those_of_compressed_tensors(size: float) -> None:
    weight = draw_blocks(size)
    packed = pack(weight)
    inverse = generate_gparam(weight.min(), weight.max())
    # Two roundings apart: 1 / (2688 / amax) and amax / 2688.
    assert torch.allclose(1 / inverse, packed.tensors["global_scale"], rtol=2**-22)
    blocks = weight.reshape(48, 10, 16)
    # Given the same global scale. It rounds amax / 6 * (1 / global), so E4M3 ties may differ.
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales, _ = calculate_qparams(low, high, ARGS, 1 / packed.tensors["global_scale"])
    found = packed.tensors["scales"].float()
    # Where a scale rounds to zero it writes 2^-3, here it is 2^-9.
    kept = (blocks.abs().amax(-1) / 6 / packed.tensors["global_scale"]) > 2.0**-10
    assert not bool(kept.all()) and torch.equal(found[kept], scales[kept])


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_those_of_compressed_tensors_bit_for_bit(size: float) -> None:
    weight = draw_blocks(size)
    packed = pack(weight)
    scale = packed.tensors["scales"].float() * packed.tensors["global_scale"]  # [N, G]
    zero = torch.zeros_like(scale)
    elements = quantize(weight, scale, zero, ARGS)
    found = make_grid(NVFP4).to_values(codes_of(packed))
    assert torch.equal(found, elements)
    assert torch.equal(packed.dequantize(), dequantize(elements, scale, zero, ARGS))

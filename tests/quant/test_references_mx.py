"""MX formats bit for bit against published implementations.

torchao's `to_mx` gives scales and elements (rule FLOOR, that of OCP MX v1.0, 6.3), ml_dtypes the
elements of blocks whose scale is 2^-127, where torchao differs: it divides by 2^-126 there, for
compilers that flush 2^-127 to zero, but writes and multiplies by 2^-127. torchao passes NaN on as
the scale 255; here NaN is refused before (tests/quant/test_codecs.py).
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.codecs import make_grid
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.activations import fake_quantize
from alphaquant.spaces.formats import parse_format

TORCHAO = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6": DTYPE_FP6_E3M2,
    "mxfp6-e2m3": DTYPE_FP6_E2M3,
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8-e5m2": torch.float8_e5m2,
}
ML_DTYPES = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6": ml_dtypes.float6_e3m2fn,
    "mxfp6-e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp8-e5m2": ml_dtypes.float8_e5m2,
}
every_format = pytest.mark.parametrize("name", TORCHAO)


def draw_blocks(n_rows: int = 96, n_blocks: int = 6, seed: int = 0) -> Tensor:
    """Weights [N, 32 * n_blocks] of every size that float32 has, block by block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(n_rows, n_blocks, 32, generator=generator, dtype=torch.float64)
    exponent = torch.randint(-152, 127, (n_rows, n_blocks, 1), generator=generator)
    return torch.ldexp(blocks, exponent).to(torch.float32).clamp(-3e38, 3e38).flatten(-2)


def hand_made_blocks() -> Tensor:
    """Blocks at the edges of the rule, [N, 32]."""
    largest = torch.finfo(torch.float32).max
    blocks = torch.zeros(9, 32)
    blocks[1] = -0.0
    blocks[2] = torch.linspace(-8, 8, 32).nextafter(torch.zeros(32))  # saturates below 8
    blocks[3] = torch.linspace(-2, 2, 32) * 2.0**-140  # float32 subnormals
    blocks[4], blocks[4, 0] = 2.0**-60, largest  # tiny beside huge
    blocks[5] = torch.tensor([largest, -largest]).repeat(16)
    blocks[6] = torch.arange(32) * 0.25 - 4  # ties of several elements
    blocks[7] = torch.arange(32) * 2.0**-18 - 2.0**-14  # subnormals of e5m2 beside ...
    blocks[7, 0] = 1.9  # ... a number that decides the scale
    blocks[8], blocks[8, 3] = -1e-30, -0.0
    return blocks


def pack(weight: Tensor, name: str) -> PackedMatrix:
    rounded = quantize_rtn(weight[None], parse_format(name), "minmax")
    packed = rounded.pack(0, slice(None))
    assert torch.equal(packed.dequantize(), rounded.weights()[0])
    return packed


def codes_of(packed: PackedMatrix) -> Tensor:
    return unpack_codes(packed.tensors["codes"], packed.format.bits, packed.cols)


def unpacked_codes(data: Tensor, name: str) -> Tensor:
    """One code per byte of torchao's elements, of which only e2m1 are packed, low bits first."""
    data = data.view(torch.uint8)
    return torch.stack([data & 15, data >> 4], -1).flatten(-2) if name == "mxfp4" else data


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@every_format
@pytest.mark.parametrize("weight", [draw_blocks(), hand_made_blocks()], ids=["drawn", "hand made"])
def test_scales_elements_and_weights_are_those_of_torchao(name: str, weight: Tensor) -> None:
    packed = pack(weight, name)
    scales, data = to_mx(weight, TORCHAO[name], 32)
    assert torch.equal(packed.tensors["scales"], scales.view(torch.uint8))
    theirs = to_dtype(data, scales, TORCHAO[name], 32, torch.float32)
    usual = (packed.tensors["scales"] > 0).repeat_interleave(32, -1)
    assert bool(usual.any()) and not bool(usual.all())
    assert torch.equal(codes_of(packed)[usual], unpacked_codes(data, name)[usual])
    assert_same_bits(packed.dequantize()[usual], theirs[usual])
    # Scale byte 0: theirs are the elements of 2^-126, see the file header.
    grid = make_grid(parse_format(name))
    doubled = grid.to_codes(grid.snap(weight / 2.0**-126))
    assert torch.equal(unpacked_codes(data, name)[~usual], doubled[~usual])


@every_format
@pytest.mark.parametrize("weight", [draw_blocks(), hand_made_blocks()], ids=["drawn", "hand made"])
def test_elements_under_any_scale_are_those_of_ml_dtypes(name: str, weight: Tensor) -> None:
    packed, theirs = pack(weight, name), ML_DTYPES[name]
    scale_bytes = packed.tensors["scales"].numpy()
    scale = scale_bytes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, -1)
    # In float64 the quotient by a power of two is exact, also under 2^-127. It saturates (OCP MX
    # 6.3), where the 8-bit types of ml_dtypes overflow.
    limit = float(ml_dtypes.finfo(theirs).max)
    elements = (weight.numpy().astype(np.float64) / scale).clip(-limit, limit).astype(theirs)
    assert np.array_equal(codes_of(packed).numpy(), elements.view(np.uint8))
    made = (elements.astype(np.float64) * scale).astype(np.float32)
    assert_same_bits(packed.dequantize(), torch.from_numpy(made))


@every_format
def test_a_bfloat16_matrix_with_a_short_last_block_is_torchaos_padded_with_zeros(
    name: str,
) -> None:
    weight = draw_blocks(seed=1)[:, :171].to(torch.bfloat16)
    scales, data = to_mx(torch.nn.functional.pad(weight, (0, 21)), TORCHAO[name], 32)
    packed = pack(weight.to(torch.float32), name)
    assert torch.equal(packed.tensors["scales"], scales.view(torch.uint8))
    usual = (packed.tensors["scales"] > 0).repeat_interleave(32, -1)[:, :171]
    theirs = to_dtype(data, scales, TORCHAO[name], 32, torch.float32)[:, :171]
    assert_same_bits(packed.dequantize()[usual], theirs[usual])


@every_format
def test_activations_are_those_of_torchao(name: str) -> None:
    tokens = (draw_blocks(seed=2) * 2.0**-20).to(torch.bfloat16).reshape(2, 48, 192)
    scales, data = to_mx(tokens, TORCHAO[name], 32)
    theirs = to_dtype(data, scales, TORCHAO[name], 32, torch.float32).to(torch.bfloat16)
    usual = (scales.view(torch.uint8) > 0).repeat_interleave(32, -1)
    found = fake_quantize(tokens, parse_format(name))
    assert torch.equal(found[usual].view(torch.int16), theirs[usual].view(torch.int16))


@every_format
def test_every_grid_value_times_a_power_of_two_comes_back(name: str) -> None:
    fmt = parse_format(name)
    grid = make_grid(fmt)
    values = grid.to_values(torch.arange(2**fmt.bits, dtype=torch.uint8))
    values = values[values.abs() <= grid.high]
    n_blocks = -(-len(values) // 31)
    blocks = torch.nn.functional.pad(values, (0, 31 * n_blocks - len(values))).reshape(-1, 31)
    # The largest value in every block makes the scale the power itself.
    blocks = torch.cat([blocks, torch.full((n_blocks, 1), grid.high)], -1)
    for k in (-100, -7, 0, 1, 90):
        weight = blocks * 2.0**k
        packed = pack(weight, name)
        assert packed.tensors["scales"].unique().tolist() == [127 + k]
        assert_same_bits(packed.dequantize(), weight)


@every_format
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_every_block_is_the_grid_times_one_power_of_two(name: str, search: str) -> None:
    weight = torch.cat([draw_blocks(seed=3)[:, :171], draw_blocks(seed=4)[:, :171] * 2.0**-30])
    fmt = parse_format(name)
    made = quantize_rtn(weight[None], fmt, search).weights()[0].to(torch.float64)
    packed = quantize_rtn(weight[None], fmt, search).pack(0, slice(None))
    assert packed.tensors["scales"].shape == (192, 6)
    assert packed.tensors["scales"].dtype == torch.uint8
    grid = make_grid(fmt)
    values = grid.to_values(torch.arange(2**fmt.bits)).to(torch.float64)
    values = values[values.abs() <= grid.high]
    power = torch.ldexp(torch.ones(192, 6), packed.tensors["scales"].to(torch.int32) - 127)
    elements = made / power.to(torch.float64).repeat_interleave(32, -1)[:, :171]
    assert bool(torch.isin(elements, values).all())

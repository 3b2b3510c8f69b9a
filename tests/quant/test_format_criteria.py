"""What formats promise on matrices as models have them: widths, Gaussian weights, bad numbers."""

import math

import pytest
import torch
from torch import Tensor

from alphaquant.quant.codecs import make_grid
from alphaquant.quant.rounding import factorize, quantize_gptq, quantize_rtn
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import SEARCHES, draw_weights

DEEPSEEK_WIDTH = 10944  # 64 * 171: 85.5 groups of 128
TAILED = {  # format -> (width, scales per row)
    "int1-g128": (DEEPSEEK_WIDTH, 86),
    "int1-g256": (DEEPSEEK_WIDTH + 5, 43),
    "int1-row": (DEEPSEEK_WIDTH + 5, 1),
    "int2-g256-asym": (DEEPSEEK_WIDTH, 43),
    "int5-g32": (DEEPSEEK_WIDTH + 5, 343),
    "int5-g64-asym": (DEEPSEEK_WIDTH + 5, 172),
    "int4-g128": (DEEPSEEK_WIDTH, 86),
    "int3-g128-asym": (DEEPSEEK_WIDTH, 86),
    "fp4-e2m1-g128": (DEEPSEEK_WIDTH, 86),
    "fp8-e4m3-g128": (DEEPSEEK_WIDTH, 86),
    "int6-g64": (DEEPSEEK_WIDTH, 171),  # 64 divides it
    "int8-row": (DEEPSEEK_WIDTH, 1),
    "mxfp4": (DEEPSEEK_WIDTH + 5, 343),
    "mxfp6": (DEEPSEEK_WIDTH + 5, 343),
    "mxfp6-e2m3": (DEEPSEEK_WIDTH + 5, 343),
    "mxfp8": (DEEPSEEK_WIDTH + 5, 343),
    "nvfp4": (DEEPSEEK_WIDTH + 5, 685),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", TAILED)
def test_a_width_that_groups_do_not_divide_packs_and_comes_back(name: str, search: str) -> None:
    fmt, (n_cols, n_groups) = parse_format(name), TAILED[name]
    weight = draw_weights(3, n_cols, seed=4)
    weight[:, -1] *= 0.01  # the tail decides its own scale
    rounded = quantize_rtn(weight[None], fmt, search)
    packed = rounded.pack(0, slice(None))
    assert rounded.scales.shape == (1, 3, n_groups)
    assert packed.tensors["scales"].shape == (3, n_groups)
    assert 8 * packed.n_bytes == fmt.storage_bits(3, n_cols)
    found, made = packed.dequantize(), rounded.weights()[0]
    assert found.shape == weight.shape
    assert torch.equal(found.view(torch.int32), made.contiguous().view(torch.int32))
    # By hand: the value of each column, less the zero point of its group, times the group's scale.
    group = torch.arange(n_cols) // (n_cols if fmt.group_size < 0 else fmt.group_size)
    values = (
        rounded.values[0] if rounded.zeros is None else rounded.values - rounded.zeros[..., group]
    )
    assert torch.equal(found, (values * rounded.scales[..., group]).reshape(3, n_cols))


@pytest.mark.parametrize("name", TAILED)
def test_a_tail_has_the_scale_it_has_alone(name: str) -> None:
    fmt = parse_format(name)
    size, n_cols = fmt.group_size, 3 * max(fmt.group_size, 16) + 11
    weight = draw_weights(6, n_cols, seed=6)
    whole = quantize_rtn(weight[None], fmt, "minmax")
    if size < 0:
        assert whole.scales.shape == (1, 6, 1)
        return
    tail = weight[:, 3 * size :].clone()
    if fmt.family == "nvfp":  # the same largest number of the matrix, in a block of its own
        tail = torch.cat([tail, torch.zeros(6, 5), weight.abs().max().expand(6, 16)], -1)
    alone = quantize_rtn(tail[None], fmt, "minmax")
    assert torch.equal(whole.scales[..., 3], alone.scales[..., 0])
    assert torch.equal(whole.weights()[..., 3 * size :], alone.weights()[..., :11])


def test_gptq_takes_a_width_that_groups_do_not_divide() -> None:
    weight = draw_weights(4, 171, seed=1)[None]
    inputs = torch.randn(400, 171, generator=torch.Generator().manual_seed(2))
    factor = factorize((inputs.T @ inputs)[None], 0.01)
    for name in TAILED:
        rounded = quantize_gptq(weight, factor, parse_format(name), "mse")
        packed = rounded.pack(0, slice(None))
        assert torch.equal(packed.dequantize(), rounded.weights()[0])


FAMILIES = {
    "int-g128": [f"int{bits}-g128" for bits in (1, 2, 3, 4, 5, 6, 8)],
    "int-g128-asym": [f"int{bits}-g128-asym" for bits in (2, 3, 4, 5, 6, 8)],
    "fp-g128": ["fp4-e2m1-g128", "fp6-e3m2-g128", "fp8-e4m3-g128"],
    "fp-g128 wide mantissa": ["fp4-e2m1-g128", "fp6-e2m3-g128", "fp8-e4m3-g128"],
    "mxfp": ["mxfp4", "mxfp6", "mxfp8"],
    "mxfp wide exponent": ["mxfp4", "mxfp6", "mxfp8-e4m3"],
}


def draw_normal(rows: int, cols: int, sigma: float) -> Tensor:
    return sigma * torch.randn(rows, cols, generator=torch.Generator().manual_seed(11))


def squared_error(weight: Tensor, name: str, search: str) -> float:
    made = quantize_rtn(weight[None], parse_format(name), search).weights()[0]
    return float((made - weight).square().mean())


@pytest.mark.parametrize("sigma", [0.02, 1.0])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_normal_weights_the_error_falls_with_every_bit(
    family: str, search: str, sigma: float
) -> None:
    weight = draw_normal(64, 256, sigma)
    errors = [squared_error(weight, name, search) for name in FAMILIES[family]]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("sigma", [0.02, 1.0])
@pytest.mark.parametrize("search", SEARCHES)
def test_on_normal_weights_blocks_of_32_beat_one_scale_per_matrix(
    search: str, sigma: float
) -> None:
    weight = draw_normal(64, 256, sigma)
    # One row holding the whole matrix has one scale per matrix.
    per_matrix = squared_error(weight.reshape(1, -1), "fp4-row", search)
    assert squared_error(weight, "mxfp4", search) < per_matrix


@pytest.mark.parametrize("search", SEARCHES)
def test_signs_keep_two_over_pi_of_normal_weights(search: str) -> None:
    # The best scale is E|w| = sigma sqrt(2 / pi), which leaves 1 - 2 / pi of the energy. The mean
    # of 64 x 256 squares, and the fit to 256 numbers at a time, move it by about 1 %.
    weight = draw_normal(64, 256, 0.02)
    relative = squared_error(weight, "int1-g256", search) / float(weight.square().mean())
    assert relative == pytest.approx(1 - 2 / math.pi, rel=0.02)


@pytest.mark.parametrize("search", SEARCHES)
def test_symmetric_int2_is_not_ternary(search: str) -> None:
    weight = draw_normal(64, 256, 0.02)
    rounded = quantize_rtn(weight[None], parse_format("int2-g64"), search)
    assert rounded.values.unique().tolist() == [-2.0, -1.0, 0.0, 1.0]
    grid = make_grid(rounded.format)
    assert (grid.low, grid.high) == (-2.0, 1.0)

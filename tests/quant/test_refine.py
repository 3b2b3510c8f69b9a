"""Refinement lowers the GPTQ objective and changes nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.kernels.grids import Grid
from alphaquant.quant.codecs import make_grid
from alphaquant.quant.refine import better_rows, fit_scales, refine, residual, sweep_codes
from alphaquant.quant.rounding import dampen, factorize, hessian_error, quantize_gptq, quantize_rtn
from alphaquant.spaces.formats import MENUS, parse_format

FORMATS = [n for n in MENUS["all"] if n != "bf16"]


def problem(n_rows: int = 12, n_cols: int = 72, n_tokens: int = 100) -> tuple[Tensor, Tensor]:
    """Two matrices with correlated inputs; the width leaves a tail group for 32, 64 and 128."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, n_rows, n_cols, generator=generator)
    mix = torch.randn(n_cols, n_cols, generator=generator)
    inputs = torch.randn(2, n_tokens, n_cols, generator=generator) @ mix
    return weight, dampen(inputs.mT @ inputs, [0.01, 0.01])


@pytest.mark.parametrize("name", FORMATS)
def test_every_step_lowers_the_objective_in_every_row(name: str) -> None:
    weight, hessian = problem()
    rounded = quantize_gptq(weight, factorize(hessian, 0.0), parse_format(name), "mse")
    before = hessian_error(weight, rounded.weights(), hessian)
    for step in (fit_scales, sweep_codes):
        rounded, _ = step(hessian, rounded, residual(weight, hessian, rounded))
        after = hessian_error(weight, rounded.weights(), hessian)
        # float32 sums of 72 x 72 products: the same objective differs by a few ulp
        assert bool((after <= before * (1 + 1e-4)).all())
        before = after


@pytest.mark.parametrize(
    "name", ["int1-g32", "int2-g64-asym", "int3-g32", "int4-g128", "mxfp4", "nvfp4"]
)
def test_refined_gptq_is_clearly_better_than_gptq(name: str) -> None:
    weight, hessian = problem()
    rounded = quantize_gptq(weight, factorize(hessian, 0.0), parse_format(name), "mse")
    refined = refine(weight, hessian, rounded, 3)
    start, end = (hessian_error(weight, r.weights(), hessian).sum() for r in (rounded, refined))
    assert float(end) < 0.97 * float(start)


@pytest.mark.parametrize(
    "name", ["int1-g64", "int2-g64-asym", "int4-g32", "fp6-e3m2-g128", "mxfp4", "nvfp4"]
)
def test_a_refined_batch_still_packs_bit_for_bit(name: str) -> None:
    weight, hessian = problem()
    refined = refine(weight, hessian, quantize_rtn(weight, parse_format(name), "minmax"), 2)
    packed = refined.pack(1, slice(0, weight.shape[1]))
    assert torch.equal(packed.dequantize(), refined.weights()[1])
    grid: Grid = make_grid(parse_format(name))
    assert torch.equal(grid.to_values(grid.to_codes(refined.values)), refined.values)


def test_one_column_left_free_moves_to_the_best_grid_value() -> None:
    # One row, one column, H = 1: the best code is the nearest one, whatever the start.
    weight = torch.tensor([[[2.6]]])
    start = quantize_rtn(weight, parse_format("int4-row"), "minmax")
    wrong = type(start)(start.format, start.values + 3, start.scales)
    hessian = torch.ones(1, 1, 1)
    found, _ = sweep_codes(hessian, wrong, residual(weight, hessian, wrong))
    assert torch.equal(found.values, start.values)


@pytest.mark.parametrize(
    "name", ["int1-g32", "int3-g32-asym", "int4-g64", "fp4-g32", "mxfp4", "nvfp4"]
)
def test_the_residual_that_is_handed_on_is_the_true_one(name: str) -> None:
    weight, hessian = problem()
    rounded = quantize_rtn(weight, parse_format(name), "minmax")
    R = residual(weight, hessian, rounded)
    for _ in range(4):
        rounded, R = fit_scales(hessian, rounded, R)
        rounded, R = sweep_codes(hessian, rounded, R)
    expected = residual(weight, hessian, rounded)
    # float32 sums over 72 inputs, updated eight times
    assert float((R - expected).norm()) <= 1e-4 * float(expected.norm())


def test_with_uncorrelated_inputs_the_fitted_scale_of_signs_is_the_mean_magnitude() -> None:
    weight, _ = problem()
    hessian = torch.eye(72).expand(2, 72, 72)
    start = quantize_rtn(weight, parse_format("int1-g32"), "mse")
    wrong = replace(start, scales=0.5 * start.scales)
    found, _ = fit_scales(hessian, wrong, residual(weight, hessian, wrong))
    means = [part.abs().mean(-1) for part in weight.split(32, -1)]
    # float16 keeps 11 bits, and the ridge of the system is 1e-6 of its diagonal
    assert torch.allclose(found.scales, torch.stack(means, -1), rtol=2**-10)


def test_block_size_changes_nothing() -> None:
    weight, hessian = problem()
    start = quantize_rtn(weight, parse_format("int3-g32-asym"), "mse")
    results = [refine(weight, hessian, start, 2, blocksize).weights() for blocksize in (1, 32, 72)]
    assert float((results[0] - results[1]).abs().max()) <= 1e-5 * float(weight.abs().max())
    assert float((results[0] - results[2]).abs().max()) <= 1e-5 * float(weight.abs().max())


def test_no_sweeps_return_the_start() -> None:
    weight, hessian = problem()
    start = quantize_rtn(weight, parse_format("int4-g32"), "mse")
    assert refine(weight, hessian, start, 0) is start


@pytest.mark.parametrize("name", ["int3-g32-asym", "int4-g64", "mxfp4", "nvfp4"])
def test_rows_are_taken_from_the_better_of_two(name: str) -> None:
    weight, hessian = problem()
    fmt = parse_format(name)
    first = quantize_gptq(weight, factorize(hessian, 0.0), fmt, "mse")
    second = quantize_gptq(weight, factorize(hessian, 0.0, actorder=True), fmt, "mse")
    errors = [hessian_error(weight, r.weights(), hessian) for r in (first, second)]
    is_second = errors[1] < errors[0]
    assert bool(is_second.any()) and not bool(is_second.all())
    expected = torch.where(is_second.unsqueeze(-1), second.weights(), first.weights())
    for pair in ((first, second), (second, first)):
        assert torch.equal(better_rows(weight, hessian, *pair).weights(), expected)

"""Refinement lowers the GPTQ objective and changes nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.kernels.grids import Grid
from alphaquant.quant.codecs import make_grid
from alphaquant.quant.refine import refine, sweep
from alphaquant.quant.rounding import dampen, factorize, hessian_error, quantize_gptq, quantize_rtn
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import MENUS

FORMATS = [n for n in MENUS["all"] if n != "bf16"]


def problem(n_rows: int = 12, n_cols: int = 72, n_tokens: int = 100) -> tuple[Tensor, Tensor]:
    """Two matrices with correlated inputs; the width leaves a tail group for 32, 64 and 128."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, n_rows, n_cols, generator=generator)
    mix = torch.randn(n_cols, n_cols, generator=generator)
    inputs = torch.randn(2, n_tokens, n_cols, generator=generator) @ mix
    return weight, dampen(inputs.mT @ inputs, [0.01, 0.01])


@pytest.mark.parametrize("name", FORMATS)
def test_a_sweep_lowers_the_objective_in_every_row(name: str) -> None:
    weight, hessian = problem()
    rounded = quantize_gptq(weight, factorize(hessian, 0.0), parse_format(name), "mse")
    before = hessian_error(weight, rounded.weights(), hessian)
    after = hessian_error(weight, sweep(weight, hessian, rounded).weights(), hessian)
    # float32 sums of 72 x 72 products: the same objective differs by a few ulp
    assert bool((after <= before * (1 + 1e-4)).all())


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
    start = quantize_rtn(weight, parse_format("mxfp4"), "minmax")
    wrong = replace(start, values=start.values + 1)
    found = sweep(weight, torch.ones(1, 1, 1), wrong)
    assert torch.equal(found.values, start.values)


def test_with_uncorrelated_inputs_the_fitted_scale_of_signs_is_the_mean_magnitude() -> None:
    weight, _ = problem()
    hessian = torch.eye(72).expand(2, 72, 72)
    start = quantize_rtn(weight, parse_format("int1-g32"), "mse")
    found = sweep(weight, hessian, replace(start, scales=0.5 * start.scales))
    means = [part.abs().mean(-1) for part in weight.split(32, -1)]
    # float16 keeps 11 bits
    assert torch.allclose(found.scales, torch.stack(means, -1), rtol=2**-11)


def test_no_sweeps_return_the_start() -> None:
    weight, hessian = problem()
    start = quantize_rtn(weight, parse_format("int4-g32"), "mse")
    assert refine(weight, hessian, start, 0) is start

"""Elements and power-of-two scales against ml_dtypes, the published small numbers of numpy."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from alphaquant.kernels.grids import FloatGrid, from_e8m0
from alphaquant.spaces.formats import ELEMENTS

THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def make_grid(name: str) -> FloatGrid:
    element = ELEMENTS[name]
    return FloatGrid(element.exponent_bits, element.mantissa_bits, element.max_value)


def draw_points(grid: FloatGrid, n_finite: int) -> Tensor:
    """10^5 points over the range and beyond, all ties with their neighbours, and every size."""
    values = grid.to_values(torch.arange(n_finite, dtype=torch.uint8))
    ties = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(ties, torch.tensor(toward)) for toward in (-9e9, 9e9)]
    sizes = torch.ldexp(torch.ones(160), torch.arange(-149, 11))
    positive = torch.cat([values, ties, *around, sizes, 1.25 * sizes])
    sweep = torch.linspace(-1.2 * grid.high, 1.2 * grid.high, 100_000)
    return torch.cat([sweep, positive, -positive])


@pytest.mark.parametrize("name", THEIRS)
def test_limits_values_and_codes_are_those_of_the_published_type(name: str) -> None:
    grid, info = make_grid(name), ml_dtypes.finfo(THEIRS[name])
    assert (grid.low, grid.high) == (float(info.min), float(info.max))
    codes = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8)
    theirs = codes.view(THEIRS[name]).astype(np.float32)
    finite = np.isfinite(theirs)
    ours = grid.to_values(torch.from_numpy(codes)).numpy()
    assert np.array_equal(ours[finite].view(np.int32), theirs[finite].view(np.int32))
    # Where the type stores NaN and infinity, this grid has numbers that it never writes.
    assert bool((np.abs(ours[~finite]) > grid.high).all())


@pytest.mark.parametrize("name", THEIRS)
def test_rounding_gives_the_codes_of_the_published_type(name: str) -> None:
    grid = make_grid(name)
    bits = ELEMENTS[name].bits
    n_finite = int((grid.to_values(torch.arange(2 ** (bits - 1))) <= grid.high).sum())
    points = draw_points(grid, n_finite)
    # OCP MX 6.3 saturates every element; the published 8-bit types overflow to NaN and infinity.
    theirs = points.numpy().clip(grid.low, grid.high).astype(THEIRS[name])
    snapped = grid.snap(points)
    assert np.array_equal(snapped.numpy().view(np.int32), theirs.astype(np.float32).view(np.int32))
    assert np.array_equal(grid.to_codes(snapped).numpy(), theirs.view(np.uint8))


def test_powers_of_two_are_those_of_the_published_type() -> None:
    codes = np.arange(255, dtype=np.uint8)
    theirs = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(from_e8m0(torch.from_numpy(codes)).numpy().astype(np.float64), theirs)
    assert bool(np.isnan(np.array([255], np.uint8).view(ml_dtypes.float8_e8m0fnu)[0]))

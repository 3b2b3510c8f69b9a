"""Grids: every code, rounding against brute force, torch's own float8, powers of two."""

import math

import pytest
import torch
from torch import Tensor

from alphaquant.kernels.grids import (
    FloatGrid,
    Grid,
    IntegerGrid,
    SignGrid,
    from_e8m0,
    power_of_two,
    to_e8m0,
)
from alphaquant.spaces.formats import ELEMENTS

GRIDS: dict[str, Grid] = {
    name: FloatGrid(e.exponent_bits, e.mantissa_bits, e.max_value) for name, e in ELEMENTS.items()
} | {
    f"int{bits}{'s' if signed else 'u'}": IntegerGrid(bits, signed)
    for bits in (2, 3, 4, 5, 6, 8)
    for signed in (True, False)
}
GRIDS["int1"] = SignGrid()
BITS = {name: element.bits for name, element in ELEMENTS.items()} | {
    name: int(name[3]) for name in GRIDS if name.startswith("int")
}
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E3M2_VALUES = [  # OCP MX v1.0, 5.3.2: bias 3, subnormals in steps of 1/16
    *(0.0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375),
    *(0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5),
    *(4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0),
]


def finite_codes(name: str) -> Tensor:
    """All codes that stand for finite numbers: those within the largest value."""
    grid, codes = GRIDS[name], torch.arange(2 ** BITS[name], dtype=torch.uint8)
    return codes[grid.to_values(codes).abs() <= max(grid.high, -grid.low)]


def nearest_of_all(name: str, points: Tensor) -> Tensor:
    """The closest of all values, of two equally close ones that with the even code (float64).

    Signs have one tie, zero, and code 1 wins it.
    """
    codes = finite_codes(name)
    values, order = GRIDS[name].to_values(codes).to(torch.float64).sort(stable=True)
    is_odd = codes[order] % 2 == (0 if name == "int1" else 1)
    points = points.to(torch.float64)
    above = torch.searchsorted(values, points).clamp(1, len(values) - 1)
    below = above - 1
    to_below, to_above = points - values[below], values[above] - points
    take_above = (to_above < to_below) | ((to_above == to_below) & is_odd[below])
    return torch.where(take_above, values[above], values[below]).to(torch.float32)


@pytest.mark.parametrize("name", GRIDS)
def test_every_value_is_its_own_nearest_and_every_code_comes_back(name: str) -> None:
    grid, codes = GRIDS[name], finite_codes(name)
    values = grid.to_values(codes)
    assert torch.equal(grid.snap(values), values)
    assert torch.equal(grid.to_codes(values), codes)


@pytest.mark.parametrize("name", GRIDS)
def test_a_dense_sweep_rounds_to_the_closest_of_all_values(name: str) -> None:
    grid = GRIDS[name]
    reach = 1.2 * max(grid.high, -grid.low)
    values = grid.to_values(finite_codes(name)).sort().values
    midpoints = (values[1:] + values[:-1]) / 2  # the ties, exact in float32
    points = torch.cat([torch.linspace(-reach, reach, 100_000 - len(midpoints)), midpoints])
    # Near zero the steps are small: sweep that part too.
    points = torch.cat([points, torch.linspace(-1, 1, 10_001) * float(values[values > 0][0]) * 4])
    assert torch.equal(grid.snap(points), nearest_of_all(name, points))


@pytest.mark.parametrize(
    ("name", "high", "n_values"),
    [
        ("e2m1", 6.0, 16),
        ("e2m3", 7.5, 64),
        ("e3m2", 28.0, 64),
        ("e4m3", 448.0, 254),  # not 240; two codes are NaN
        ("e5m2", 57344.0, 248),  # eight codes are infinity and NaN
        ("int1", 1.0, 2),  # -1 and 1
        ("int2s", 1.0, 4),  # -2 .. 1, not ternary
        ("int4u", 15.0, 16),
        ("int8s", 127.0, 256),
    ],
)
def test_the_largest_value_and_the_number_of_codes(name: str, high: float, n_values: int) -> None:
    assert GRIDS[name].high == high
    assert len(finite_codes(name)) == n_values
    assert float(GRIDS[name].to_values(finite_codes(name)).max()) == high


@pytest.mark.parametrize(("name", "expected"), [("e2m1", E2M1_VALUES), ("e3m2", E3M2_VALUES)])
def test_the_positive_half_is_the_published_one(name: str, expected: list[float]) -> None:
    codes = torch.arange(len(expected), dtype=torch.uint8)
    assert GRIDS[name].to_values(codes).tolist() == expected
    assert GRIDS[name].to_values(codes + len(expected)).tolist() == [-v for v in expected]


def test_e2m3_steps_are_eighths_up_to_two_then_quarters_then_halves() -> None:
    values = GRIDS["e2m3"].to_values(torch.arange(32, dtype=torch.uint8)).tolist()
    assert values == [
        *(i / 8 for i in range(16)),
        *(2 + i / 4 for i in range(8)),
        *(4 + i / 2 for i in range(8)),
    ]


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_values_and_codes_equal_torch_float8(name: str) -> None:
    codes, dtype = finite_codes(name), TORCH_DTYPES[name]
    theirs = codes.view(dtype).to(torch.float32)
    assert torch.equal(GRIDS[name].to_values(codes).view(torch.int32), theirs.view(torch.int32))
    points = torch.linspace(-GRIDS[name].high, GRIDS[name].high, 100_001)
    snapped = GRIDS[name].snap(points)
    assert torch.equal(snapped, points.to(dtype).to(torch.float32))
    assert torch.equal(GRIDS[name].to_codes(snapped), points.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_saturates_and_leaves_its_argument_alone(name: str) -> None:
    grid = GRIDS[name]
    points = torch.tensor([-math.inf, -1e38, 1e38, math.inf])
    assert grid.snap(points).tolist() == [grid.low, grid.low, grid.high, grid.high]
    assert points.tolist() == [-math.inf, pytest.approx(-1e38), pytest.approx(1e38), math.inf]


@pytest.mark.parametrize("signed", [True, False])
def test_integers_have_one_zero(signed: bool) -> None:
    snapped = IntegerGrid(4, signed).snap(torch.tensor([-0.4, -0.0, 0.4]))
    assert not bool(torch.signbit(snapped).any())


def test_signs_have_no_zero_and_take_zeros_and_no_number_as_plus_one() -> None:
    grid = SignGrid()
    assert grid.to_values(torch.tensor([0, 1], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    snapped = grid.snap(torch.tensor([-3.0, -1e-45, -0.0, 0.0, 1e-45, 3.0, math.nan]))
    assert snapped.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert grid.to_codes(snapped).tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_powers_of_two_are_exact_over_their_whole_range() -> None:
    exponents = torch.arange(-127, 128)
    expected = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64)
    assert torch.equal(power_of_two(exponents).to(torch.float64), expected)


def test_e8m0_bytes_are_the_exponent_plus_127_clamped_and_never_nan() -> None:
    exponents = torch.tensor([-200, -127, -1, 0, 7, 127, 200])
    codes = to_e8m0(exponents)
    assert codes.tolist() == [0, 0, 126, 127, 134, 254, 254]
    assert from_e8m0(codes).tolist() == [2.0**e for e in (-127, -127, -1, 0, 7, 127, 127)]

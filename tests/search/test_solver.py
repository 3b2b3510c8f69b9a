"""The solver against brute force, its bounds, its frontier, and its time on 20 000 units."""

import itertools
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import BudgetError
from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.solver import close_gap, frontier, solve

# Sums of a few doubles of similar size: a few units in the last place, 1e-12 is ample.
REL = 1e-12

Instance = tuple[FloatArray, IntArray, BoolArray]


def _instance(seed: int, max_units: int = 6, max_options: int = 5) -> Instance:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, max_units + 1)), int(rng.integers(1, max_options + 1)))
    bits = rng.integers(1, 40, shape) * int(rng.choice([1, 7, 2048]))
    cost = rng.choice([rng.random(shape) * 10, rng.integers(0, 6, shape).astype(float)])
    allowed = rng.random(shape) < 0.8
    allowed[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    return cost, bits.astype(np.int64), allowed


def _limits(bits: IntArray, allowed: BoolArray) -> tuple[int, int]:
    least = np.where(allowed, bits, bits.max()).min(axis=1).sum()
    return int(least), int(np.where(allowed, bits, 0).max(axis=1).sum())


def _optimum(instance: Instance, limit_bits: int) -> float:
    cost, bits, allowed = instance
    options = [np.flatnonzero(row) for row in allowed]
    rows = np.arange(len(cost))
    choices = (np.array(choice) for choice in itertools.product(*options))
    return min(
        float(cost[rows, c].sum()) for c in choices if int(bits[rows, c].sum()) <= limit_bits
    )


def _table(rows: list[list[tuple[int, float]]]) -> Instance:
    bits = np.array([[b for b, _ in row] for row in rows], dtype=np.int64)
    cost = np.array([[c for _, c in row] for row in rows], dtype=np.float64)
    return cost, bits, np.ones(bits.shape, dtype=np.bool_)


BLOCKED = [(1, 1000.0), (90, 0.0), (90, 0.0)]
"""The steepest move of all, too large for limits below 90: what follows is left to the fill."""

EXAMPLE = _table([[(100, 9), (200, 4), (300, 3)], [(100, 5), (200, 3), (300, 0)]])


def test_the_worked_example_of_the_header() -> None:
    path = frontier(*EXAMPLE)
    assert path.bits.tolist() == [200, 300, 500, 600]
    assert path.cost.tolist() == [14, 9, 4, 3]
    assert path.slopes == pytest.approx([0.05, 0.025, 0.01])
    assert path.choice(2).tolist() == [1, 2]
    solution = solve(*EXAMPLE, 400)
    assert (solution.choice.tolist(), solution.cost, solution.bits) == ([1, 1], 7.0, 400)
    assert (solution.lower_bound, solution.gap) == pytest.approx((6.5, 0.5 / 6.5))


def test_brute_force_agrees_on_small_cases() -> None:
    for seed in range(200):
        instance = _instance(seed)
        least, most = _limits(*instance[1:])
        limit_bits = int(np.random.default_rng(seed).integers(least, most + 1))
        optimum = _optimum(instance, limit_bits)
        greedy, exact = solve(*instance, limit_bits), close_gap(*instance, limit_bits)
        assert greedy.lower_bound <= optimum * (1 + REL) <= greedy.cost * (1 + 2 * REL), seed
        assert exact.cost == pytest.approx(optimum, rel=REL, abs=REL), seed
        # HiGHS stops at an absolute 1e-6 of an objective in thousandths of the first gap.
        open_gap = greedy.cost - greedy.lower_bound
        assert exact.cost - exact.lower_bound <= 1e-8 * open_gap + REL * (1 + exact.cost), seed
        assert max(greedy.bits, exact.bits) <= limit_bits, seed


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_solutions_are_feasible_and_never_worse_with_more_bits(
    seed: int, share: float, other: float
) -> None:
    cost, bits, allowed = _instance(seed, 12, 6)
    least, most = _limits(bits, allowed)
    limits = sorted(least + int(s * (most - least)) for s in (share, other))
    tight, ample = (solve(cost, bits, allowed, limit) for limit in limits)
    rows = np.arange(len(cost))
    for solution, limit_bits in ((tight, limits[0]), (ample, limits[1])):
        assert allowed[rows, solution.choice].all()
        assert solution.bits == bits[rows, solution.choice].sum() <= limit_bits
        assert solution.cost == pytest.approx(float(cost[rows, solution.choice].sum()))
        assert solution.lower_bound <= solution.cost
    assert ample.cost <= tight.cost * (1 + REL)
    assert ample.lower_bound <= tight.lower_bound + REL * (1 + tight.cost)


@given(st.integers(0, 10**6))
def test_every_point_of_the_frontier_is_optimal_for_its_bits(seed: int) -> None:
    instance = cost, bits, allowed = _instance(seed, 4, 4)
    path = frontier(*instance)
    rows = np.arange(len(cost))
    assert (np.diff(path.bits) > 0).all()
    assert (np.diff(path.slopes) <= 0).all()
    for point, (n_bits, total) in enumerate(zip(path.bits, path.cost, strict=True)):
        choice = path.choice(point)
        assert allowed[rows, choice].all()
        assert bits[rows, choice].sum() == n_bits
        assert cost[rows, choice].sum() == pytest.approx(total, rel=REL, abs=REL)
        assert total == pytest.approx(_optimum(instance, int(n_bits)), rel=REL, abs=REL)
        assert path.point_within(int(n_bits)) == point


@pytest.mark.parametrize(
    ("rows", "limit_bits", "choice"),
    [
        pytest.param([[(100, 5), (200, 1)]], 150, [0], id="one unit"),
        pytest.param([[(100, 5), (100, 1), (100, 1)]], 100, [1], id="equal bits, first of equals"),
        pytest.param([[(100, 5), (200, 6), (300, 1)]], 250, [0], id="dominated format"),
        pytest.param([[(100, 5), (200, 4.9), (300, 1)]], 250, [1], id="format above the hull"),
        pytest.param([[(100, 0), (200, 0)]] * 3, 600, [0, 0, 0], id="zero costs take no bits"),
        pytest.param([[(300, 1), (100, 5), (200, 2)]], 300, [0], id="columns in any order"),
        pytest.param([[(100, 5), (200, 1)]] * 3, 400, [1, 0, 0], id="equal slopes, first unit"),
        pytest.param([[(9, 4)], [(5, 1)]], 14, [0, 0], id="one format"),
        pytest.param([[(1, 1e3), (2, 1e-9)], [(1, 1), (3, 0)]], 3, [1, 0], id="costs far apart"),
        pytest.param([[(1, 9), (90, 0)], [(1, 2), (2, 0)]], 9, [0, 1], id="steepest does not fit"),
        pytest.param([BLOCKED, *[[(1, 5), (3, 3), (3, 3)]] * 2], 6, [0, 1, 0], id="one bit short"),
        pytest.param([BLOCKED, [(1, 5), (2, 2), (3, 1)]], 4, [0, 2], id="fill moves a unit twice"),
        pytest.param(
            [BLOCKED, [(1, 9), (2, 7), (4, 0)], [(1, 9), (3, 2), (3, 2)]],
            6,
            [0, 1, 1],
            id="fill falls back to a unit's smaller move",
        ),
    ],
)
def test_degenerate_cases(
    rows: list[list[tuple[int, float]]], limit_bits: int, choice: list[int]
) -> None:
    assert solve(*_table(rows), limit_bits).choice.tolist() == choice
    assert close_gap(*_table(rows), limit_bits).cost == solve(*_table(rows), limit_bits).cost


def test_a_format_that_is_not_allowed_is_never_taken() -> None:
    cost, bits, allowed = EXAMPLE
    allowed = allowed.copy()
    allowed[0, 1] = allowed[1, 0] = False
    cost = np.where(allowed, cost, np.nan)
    assert frontier(cost, bits, allowed).start.tolist() == [0, 1]
    assert solve(cost, bits, allowed, 10**9).choice.tolist() == [2, 2]
    # From (9, 3) at 300 bits: 6 per 200 bits or 3 per 100; equal slopes, so the first unit moves.
    assert solve(cost, bits, allowed, 500).choice.tolist() == [2, 1]


def test_close_gap_finds_what_greedy_misses() -> None:
    rows: list[list[tuple[int, float]]] = [[(0, 6.6), (6, 0)], [(0, 5), (5, 0)], [(0, 5), (5, 0)]]
    assert solve(*_table(rows), 10).cost == 10
    exact = close_gap(*_table(rows), 10)
    assert (exact.cost, exact.bits) == (6.6, 10)
    assert exact.gap < 1e-8


def test_close_gap_without_time_still_answers() -> None:
    cost, bits, allowed = _large(400)
    greedy = solve(cost, bits, allowed, int(3 * bits.min(axis=1).sum() / 2.156))
    timed = close_gap(cost, bits, allowed, int(3 * bits.min(axis=1).sum() / 2.156), 1e-6)
    assert greedy.lower_bound <= timed.lower_bound <= timed.cost <= greedy.cost


def test_a_limit_below_the_cheapest_choice_is_refused_with_the_least() -> None:
    for call in (solve, close_gap):
        with pytest.raises(BudgetError, match=r"199 bits.*take 200; raise the budget"):
            call(*EXAMPLE, 199)


def _large(n_units: int) -> Instance:
    """Units of three shapes, 12 formats, log-normal importance, 20 % noise."""
    rng = np.random.default_rng(0)
    per_weight: npt.NDArray[np.float64] = np.array(
        [2.156, 2.312, 2.625, 3.164, 3.328, 3.656, 4.172, 4.344, 4.688, 5.164, 6.125, 8.125]
    )
    n_weights = rng.choice([2**21, 2**20, 2**22], (n_units, 1))
    noise = rng.lognormal(0, 0.2, (n_units, 12))
    cost = rng.lognormal(0, 2, (n_units, 1)) * 4.0**-per_weight * noise
    return cost, (n_weights * per_weight).astype(np.int64), np.ones(cost.shape, dtype=np.bool_)


@pytest.mark.slow
@pytest.mark.parametrize("bits_per_weight", [2.5, 3.0, 4.25])
def test_time_of_20000_units_in_12_formats(
    bits_per_weight: float, capsys: pytest.CaptureFixture[str]
) -> None:
    cost, bits, allowed = _large(20_000)
    limit_bits = int(bits_per_weight * bits[:, 0].sum() / 2.156)
    begin = perf_counter()
    solution = solve(cost, bits, allowed, limit_bits)
    seconds = perf_counter() - begin
    with capsys.disabled():
        print(f"\nsolve 20000 x 12 at {bits_per_weight}: {seconds:.3f} s, gap {solution.gap:.1e}")
    # One fractional unit of 20 000: the gap is below one part in a thousand.
    assert 0 <= solution.gap < 1e-3


@pytest.mark.slow
def test_time_when_one_huge_unit_blocks_the_hull_path(capsys: pytest.CaptureFixture[str]) -> None:
    cost, bits, allowed = _large(20_000)
    cost[0], bits[0] = cost[0] * 1e7, bits[0] * 10_000_000
    begin = perf_counter()
    solution = solve(cost, bits, allowed, int(bits[:, 0].sum() + bits[1:, 3].sum()))
    seconds = perf_counter() - begin
    with capsys.disabled():
        print(f"\nsolve 20000 x 12, steepest step too large: {seconds:.3f} s")
    assert solution.choice[0] == 0
    assert (solution.choice[1:] > 0).mean() > 0.5

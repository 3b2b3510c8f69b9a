"""Which formats are worth quantizing, from costs in a few of them."""

import numpy as np

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.shortlist import complete_costs, shortlist
from alphaquant.search.solver import solve

BITS = np.array([2.0, 3.0, 4.0, 5.0, 8.0])
ANCHORS = (0, 2)


def test_the_worked_example() -> None:
    cost = np.array([[16.0, 5.0, 1.0], [160.0, np.nan, 10.0]])
    found = complete_costs(cost, np.array([2.0, 3.0, 4.0]), (0, 2))
    assert np.allclose(found, [[16, 5, 1], [160, 50, 10]])


def test_without_units_that_have_all_formats_the_line_is_taken() -> None:
    cost = np.array([[16.0, np.nan, 1.0]])
    assert np.allclose(complete_costs(cost, np.array([2.0, 3.0, 4.0]), (0, 2)), [[16, 4, 1]])


def test_outside_the_anchors_the_nearest_one_is_shifted() -> None:
    cost = np.array([[8.0, 2.0, 0.5], [80.0, 20.0, np.nan], [0.0, 0.0, np.nan]])
    found = complete_costs(cost, np.array([2.0, 3.0, 4.0]), (0, 1))
    assert np.allclose(found[1, 2], 5.0)  # a quarter of its 20, as in the first unit
    assert found[2, 2] < 1e-20  # a unit that costs nothing costs nothing anywhere


def drawn(n_units: int) -> tuple[FloatArray, IntArray, BoolArray]:
    """Costs near 4^-bits with a level per unit and a little noise; equal weights."""
    generator = np.random.default_rng(0)
    level = np.exp(2 * generator.standard_normal((n_units, 1)))
    noise = np.exp(0.25 * generator.standard_normal((n_units, len(BITS))))
    cost = level * 4.0**-BITS * noise
    bits = np.tile((BITS * 1000).astype(np.int64), (n_units, 1))
    return cost, bits, np.ones(cost.shape, dtype=np.bool_)


def test_a_shortlist_from_anchors_loses_little_of_the_optimum() -> None:
    true, bits, allowed = drawn(400)
    seen = true.copy()
    seen[40:, [1, 3, 4]] = np.nan  # the first 40 units have all formats
    limit = 400 * 3600
    listed = shortlist(complete_costs(seen, BITS, ANCHORS), bits, allowed, [limit])
    listed[:, list(ANCHORS)] = True
    assert listed.sum() < 0.85 * listed.size
    best, found = (solve(true, bits, mask, limit).cost for mask in (allowed, listed))
    anchors_only = np.zeros_like(allowed)
    anchors_only[:, list(ANCHORS)] = True
    assert found < 1.05 * best < 0.9 * solve(true, bits, anchors_only, limit).cost


def test_what_is_not_allowed_is_never_listed() -> None:
    cost, bits, allowed = drawn(20)
    allowed[:10, 1] = False
    listed = shortlist(cost, bits, allowed, [20 * 2100, 20 * 8000])
    assert not (listed & ~allowed).any()
    assert listed[:, 4].any() and listed[:, 0].any()

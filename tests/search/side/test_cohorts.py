"""Formats that experts share: subsets against all combinations, and exchanges against subsets."""

from itertools import combinations

import numpy as np
import pytest

from alphaquant.search.side import cohorts
from alphaquant.search.side.cohorts import Cohorts, best_columns, choose, uncovered

EXAMPLE = np.array([[0.0, 5, 5], [5, 0, 4], [5, 5, 0]])


def _cohorts(max_formats: int | None) -> Cohorts:
    return Cohorts(np.zeros(3, dtype=np.int64), 1, np.ones(3, dtype=np.bool_), max_formats)


def test_the_worked_example_of_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(EXAMPLE, _cohorts(2))
    assert (found.choice.tolist(), found.is_in.tolist()) == ([0, 2, 2], [[True, False, True]])
    assert (found.least.tolist(), found.alone.tolist()) == ([4], [0])
    monkeypatch.setattr(cohorts, "MAX_SUBSETS", 2)
    greedy = choose(EXAMPLE, _cohorts(2))
    assert (greedy.choice.tolist(), greedy.least.tolist()) == ([0, 2, 2], [0])


@pytest.mark.parametrize("max_formats", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_columns_are_the_best_of_all_combinations(
    max_formats: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((6, 9))
    table[rng.random(table.shape) < 0.2] = np.inf
    table[0], table[5] = rng.random(9), np.inf if seed == 0 else table[5]
    size = min(max_formats, 6)
    sums = [table[list(c)].min(axis=0).sum() for c in combinations(range(6), size)]
    columns, is_exact = best_columns(table, max_formats)
    assert is_exact
    assert len(set(columns.tolist())) == len(columns) <= max_formats
    assert table[columns].min(axis=0).sum() == pytest.approx(min(sums))
    monkeypatch.setattr(cohorts, "MAX_SUBSETS", 0)
    exchanged, _ = best_columns(table, max_formats)
    assert len(set(exchanged.tolist())) <= max_formats
    assert min(sums) - 1e-12 <= table[exchanged].min(axis=0).sum() <= 1.3 * min(sums)


def test_an_exchange_leaves_what_greedy_took_first() -> None:
    # Greedy takes the third, 3 + 3; the first and second together cost nothing.
    table = np.array([[0.0, 9, 0, 9], [9, 0, 9, 0], [3, 3, 3, 3]])
    usable = np.arange(3)
    assert cohorts._exchanged(table, usable, 2).tolist() == [0, 1]


def test_a_layer_whose_experts_have_no_common_formats_is_found() -> None:
    allowed = np.array([[True, False, True], [True, False, False], [False, True, True]])
    assert uncovered(allowed, _cohorts(2)) is None
    assert uncovered(allowed, _cohorts(1)) == 0
    assert uncovered(allowed, _cohorts(None)) is None

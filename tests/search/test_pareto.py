"""The front against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import ConfigError
from alphaquant.search.pareto import nondominated, nondominated_reference

# Few distinct values, so that ties and duplicates are common.
COORDINATE = st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf"), float("-inf"), -0.0])


def _brute_force(points: list[tuple[float, ...]]) -> list[bool]:
    def is_beaten(n: int) -> bool:
        for m, other in enumerate(points):
            no_larger = all(a <= b for a, b in zip(other, points[n], strict=True))
            if no_larger and (other != points[n] or m < n):
                return True
        return False

    return [not is_beaten(n) for n in range(len(points))]


@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.tuples(*[COORDINATE] * d), min_size=1)))
def test_the_front_is_exact_with_ties_duplicates_and_infinities(
    points: list[tuple[float, ...]],
) -> None:
    assert nondominated(points).tolist() == _brute_force(points)
    assert nondominated_reference(np.array(points)).tolist() == _brute_force(points)


def test_the_worked_example() -> None:
    points = [(1, 5), (2, 3), (2, 4), (3, 3), (2, 3)]
    assert nondominated(points).tolist() == [True, True, False, False, False]


def test_no_points_have_an_empty_front() -> None:
    assert nondominated(np.empty((0, 2))).tolist() == []
    assert nondominated(np.empty((0, 3))).tolist() == []


@pytest.mark.parametrize("points", [[(1.0, float("nan"))], [1.0, 2.0], np.empty((3, 0))])
def test_what_is_no_table_of_numbers_is_refused(points: object) -> None:
    with pytest.raises(ConfigError, match="one row per scored assignment"):
        nondominated(points)  # type: ignore[arg-type]

"""Front and best of rows."""

from dataclasses import replace

from alphaquant.studies.result import SearchResult, best_of, front_of


def test_front_is_by_bits_and_of_equal_points_the_first(found: SearchResult) -> None:
    points = [(4.0, 2.0), (3.0, 5.0), (4.0, 2.0), (4.5, 2.5), (5.0, 1.0)]
    rows = [
        replace(found.rows[0], number=n, bits_per_weight=b, kl=k)
        for n, (b, k) in enumerate(points)
    ]
    assert [row.number for row in front_of(rows)] == [1, 0, 4]


def test_best_has_the_lowest_kl_then_the_fewest_bits_then_comes_first(
    found: SearchResult,
) -> None:
    points = [(4.0, 2.0), (4.2, 1.0), (4.1, 1.0), (4.1, 1.0)]
    rows = [
        replace(found.rows[0], number=n, bits_per_weight=b, kl=k)
        for n, (b, k) in enumerate(points)
    ]
    assert best_of(rows).number == 2

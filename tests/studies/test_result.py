"""Front, best and what each stage gained, of rows that a test makes."""

import pytest

from alphaquant.studies.gate.winner import best_of
from alphaquant.studies.result import StageGain, front_of, stage_gains
from alphaquant.studies.store.study import TrialRow


def row(
    number: int, bits: float, kl: float, origin: str = "knobs", pruned: bool = False
) -> TrialRow:
    return TrialRow(
        number, origin, f"d{number}", bits, 1, kl, 0.0, (), 0.9, 50.0, 0.0, None, 0.0, None, pruned
    )


def rows_of(points: list[tuple[float, float]]) -> list[TrialRow]:
    return [row(n, b, k) for n, (b, k) in enumerate(points)]


def test_front_is_by_bits_and_of_equal_points_the_first() -> None:
    rows = rows_of([(4.0, 2.0), (3.0, 5.0), (4.0, 2.0), (4.5, 2.5), (5.0, 1.0)])
    assert [r.number for r in front_of(rows)] == [1, 0, 4]


def test_best_has_the_lowest_kl_then_the_fewest_bits_then_comes_first() -> None:
    assert best_of(rows_of([(4.0, 2.0), (4.2, 1.0), (4.1, 1.0), (4.1, 1.0)])).number == 2


def test_a_trial_that_ended_early_is_neither_on_the_front_nor_best() -> None:
    rows = [row(0, 4.0, 2.0), row(1, 3.9, 0.1, pruned=True), row(2, 4.1, 1.0)]
    assert [r.number for r in front_of(rows)] == [0, 2]
    assert best_of(rows).number == 2


def test_stages_follow_each_other_as_they_began_with_the_lowest_kl_so_far() -> None:
    rows = [
        row(0, 4.0, 0.8, "uniform:int4-g64"),
        row(1, 5.0, 0.1, "uniform:int8-row"),  # above the limit
        row(2, 4.2, 0.4, "knobs"),
        row(3, 4.2, 0.5, "allocator:error"),
        row(4, 4.1, 0.4, "allocator:fisher"),
        row(5, 4.2, 0.1, "size"),
        row(6, 4.2, 0.01, "knobs", pruned=True),
        row(7, 4.2, 0.05, "knobs"),
        row(8, 4.2, 0.05, "groups"),
    ]
    assert stage_gains(rows, 4.25) == (
        StageGain("uniform", 2, 0.8, None),
        StageGain("default knobs", 1, 0.4, 0.5),
        StageGain("allocators", 2, 0.4, 1.0),
        StageGain("size", 1, 0.1, 0.25),
        StageGain("sampled knobs", 2, 0.05, 0.5),
        StageGain("sampled groups", 1, 0.05, 1.0),
    )


@pytest.mark.parametrize(("kl", "ratio"), [(0.0, None), (0.5, 1.0)])
def test_stage_before_which_nothing_was_or_was_perfect_has_no_ratio(
    kl: float, ratio: float | None
) -> None:
    rows = [
        row(0, 9.0, 0.1, "size"),
        row(1, 4.0, kl, "uniform:int4-g64"),
        row(2, 4.0, 0.5, "allocator:error"),
    ]
    assert stage_gains(rows, 4.25) == (
        StageGain("size", 1, None, None),
        StageGain("uniform", 1, kl, None),
        StageGain("allocators", 1, kl, ratio),
    )

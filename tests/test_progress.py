"""Seconds by stage, and progress that is passed on."""

from types import SimpleNamespace

import pytest

from alphaquant import progress
from alphaquant.progress import N_RECENT, StageClock, StageTimes, no_progress, of_total

Call = tuple[str, int, int]


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def clock(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> StageClock:
    """A clock whose calls come at 0, 2, 3 and 7 seconds."""
    times = iter([0.0, 2.0, 3.0, 7.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    return StageClock(lambda *call: calls.append(call))


def test_time_between_calls_counts_for_the_stage_of_the_earlier_one(clock: StageClock) -> None:
    clock("hessians", 0, 2)
    clock("bank", 0, 2)
    clock("hessians", 1, 2)
    clock.stop()
    assert clock.seconds == {"hessians": 2.0 + 4.0, "bank": 1.0}


def test_time_after_a_last_step_counts_for_the_stage_that_follows(clock: StageClock) -> None:
    clock("load", 0, 1)
    clock("load", 1, 1)
    clock("bank", 0, 4)
    clock.stop()
    assert clock.seconds == {"load": 2.0, "bank": 5.0}


def test_time_between_a_last_step_and_the_stop_counts_for_its_stage(clock: StageClock) -> None:
    clock("load", 0, 1)
    clock("report", 1, 1)
    clock.stop()
    assert clock.seconds == {"load": 2.0, "report": 1.0}


def test_calls_are_passed_on(clock: StageClock, calls: list[Call]) -> None:
    clock("load", 0, 1)
    clock("bank", 2, 4)
    assert calls == [("load", 0, 1), ("bank", 2, 4)]


def test_nothing_is_booked_after_stop(clock: StageClock) -> None:
    clock("load", 0, 1)
    clock.stop()
    clock("bank", 0, 1)
    clock.stop()
    assert clock.seconds == {"load": 2.0, "bank": 4.0}


def test_part_of_a_stage_counts_from_its_offset(clock: StageClock, calls: list[Call]) -> None:
    clock.shifted(48, 112)("teacher", 8, 64)
    assert calls == [("teacher", 56, 112)]


def test_first_steps_of_a_stage_are_told_as_some_of_all_or_not_at_all(
    clock: StageClock, calls: list[Call]
) -> None:
    for tell in (of_total(clock, "load", 7), of_total(clock, "load", 0)):
        tell("load", 2, 3)
        tell("copy", 1, 4)
    assert calls == [("load", 2, 7), ("copy", 1, 4), ("copy", 1, 4)]


def test_no_progress_takes_any_call() -> None:
    no_progress("load", 0, 1)


def recorded(*calls: tuple[str, int, int, float]) -> StageTimes:
    """Times after calls of a stage, steps done, steps, and when."""
    times = StageTimes()
    for call in calls:
        times.record(*call)
    return times


def test_worked_example_of_what_is_left() -> None:
    times = recorded(
        ("load", 0, 1, 0.0), ("load", 1, 1, 2.0), ("bank", 0, 4, 3.0), ("bank", 1, 4, 8.0)
    )
    assert times.seconds == {"load": 2.0, "bank": 6.0}
    assert times.remaining("bank", 8.0) == 15.0
    assert times.remaining("bank", 10.0) == 13.0
    assert times.elapsed("bank", 10.0) == 8.0
    assert (times.remaining("load", 10.0), times.elapsed("load", 10.0)) == (None, 2.0)


def test_a_step_that_takes_longer_than_the_others_leaves_time_for_those_after_it() -> None:
    times = recorded(("bank", 0, 3, 0.0), ("bank", 1, 3, 5.0))
    assert times.remaining("bank", 100.0) == 5.0


def test_nothing_is_said_of_a_stage_before_its_first_step() -> None:
    assert recorded(("bank", 0, 3, 0.0)).remaining("bank", 9.0) is None


def test_steps_that_were_found_and_not_made_say_nothing() -> None:
    replayed = [("study", i, 40, 1e-5 * i) for i in range(30)]
    assert recorded(*replayed).remaining("study", 1.0) is None
    assert recorded(*replayed, ("study", 30, 40, 6.0)).remaining("study", 6.0) == pytest.approx(
        60.0, rel=1e-3
    )


def test_time_of_stages_in_between_is_theirs() -> None:
    times = recorded(
        ("study", 0, 9, 0.0),
        ("study", 1, 9, 2.0),
        ("probe", 0, 1, 2.0),
        ("probe", 1, 1, 500.0),
        ("study", 2, 9, 502.0),
    )
    assert times.remaining("study", 502.0) == 7 * 2.0


def test_estimate_follows_the_last_steps() -> None:
    slow = [("costs", i, 100, 10.0 * i) for i in range(20)]
    fast = [("costs", 20 + i, 100, 191.0 + i) for i in range(N_RECENT)]
    times = recorded(*slow, *fast)
    assert times.remaining("costs", fast[-1][3]) == 100 - 20 - N_RECENT + 1


def test_stage_that_starts_again_goes_at_the_pace_of_before() -> None:
    times = recorded(
        ("costs", 0, 2, 0.0),
        ("costs", 2, 2, 8.0),
        ("study", 1, 9, 20.0),
        ("costs", 0, 2, 21.0),
    )
    assert times.remaining("costs", 21.0) == 8.0
    assert times.elapsed("costs", 22.0) == 9.0


def test_in_a_later_round_the_pace_of_the_earlier_one_ends_with_the_first_step() -> None:
    times = recorded(
        ("costs", 0, 16, 0.0),
        ("costs", 16, 16, 0.2),
        ("costs", 0, 16, 1.0),
        ("costs", 1, 16, 91.0),
    )
    assert times.remaining("costs", 91.0) == 15 * 90.0


def test_stages_that_take_turns_have_what_is_left_of_both() -> None:
    times = recorded(("bank", 0, 4, 0.0), ("hessians", 0, 4, 0.0), ("hessians", 1, 4, 1.0))
    times.record("bank", 0, 4, 1.0)
    # The bank's first step runs: how long its steps take is not known, so nothing is.
    assert times.remaining_with_others("hessians", 5.0) is None
    times.record("bank", 1, 4, 10.0)
    assert times.remaining_with_others("hessians", 10.0) == 3 * 1.0 + 3 * 9.0
    assert times.remaining_with_others("bank", 10.0) == 3 * 1.0 + 3 * 9.0


def test_stage_that_waits_for_another_one_has_what_is_left_of_that_too() -> None:
    times = recorded(("study", 0, 9, 0.0), ("study", 1, 9, 2.0), ("probe", 0, 10, 2.0))
    times.record("probe", 1, 10, 7.0)
    assert times.remaining_with_others("probe", 7.0) == 9 * 5.0
    assert times.remaining_with_others("study", 7.0) == 8 * 2.0 + 9 * 5.0
    times.record("probe", 10, 10, 50.0)
    assert times.remaining_with_others("study", 50.0) == 8 * 2.0

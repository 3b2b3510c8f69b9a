"""Seconds by stage, and progress that is passed on."""

from types import SimpleNamespace

import pytest

from alphaquant.studies import progress
from alphaquant.studies.progress import StageClock, no_progress

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
    clock("load", 0, 1)
    clock("load", 1, 1)
    clock("bank", 0, 4)
    clock.stop()
    assert clock.seconds == {"load": 3.0, "bank": 4.0}


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


def test_no_progress_takes_any_call() -> None:
    no_progress("load", 0, 1)

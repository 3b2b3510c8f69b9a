"""The Optuna study: taken up again, and refused when it is another's or damaged."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState

from alphaquant.errors import StoreError
from alphaquant.evaluators.base import Score
from alphaquant.spaces.assignment import BitCount
from alphaquant.studies.objective import Measured
from alphaquant.studies.store.study import (
    TrialRow,
    find_duplicate,
    finish_trial,
    finished_rows,
    make_row,
    open_study,
)
from alphaquant.studies.store.urls import sqlite_url

ROW = TrialRow(
    number=0,
    origin="knobs",
    digest="d0",
    bits_per_weight=4.1,
    checkpoint_bytes=1000,
    kl=0.1 + 0.2,
    kl_stderr=1e-3,
    kl_per_window=(0.1, 1 / 3),
    same_top=0.9,
    perplexity=60.0,
    predicted_kl=0.2,
    gap=None,
    seconds=1.5,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def add_row(study: optuna.Study, row: TrialRow) -> None:
    finish_trial(study, study.ask(), row)


def test_trial_that_ended_early_is_pruned_and_has_no_values(url: str) -> None:
    with open_study(url, "s", "f") as study:
        add_row(study, ROW)
        add_row(study, replace(ROW, number=1, is_pruned=True))
        assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
        assert [t.values for t in study.trials] == [[ROW.bits_per_weight, ROW.kl], None]


def test_trial_that_a_kill_left_running_fails_and_is_not_numbered(url: str) -> None:
    with open_study(url, "s", "f") as study:
        study.ask()
    with open_study(url, "s", "f") as study:
        assert [t.state for t in study.trials] == [TrialState.FAIL]
        add_row(study, ROW)
        assert [(row.number, row.digest) for row in finished_rows(study)] == [(0, "d0")]


@pytest.mark.parametrize("name", ["with space", "per%20cent", "brace{0}", "ünï", "que?stion"])
def test_directory_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with open_study(sqlite_url(tmp_path / name / "study.db"), "s", "f") as study:
        add_row(study, ROW)
    assert (tmp_path / name / "study.db").stat().st_size > 0


def test_study_of_another_search_is_refused(url: str) -> None:
    with open_study(url, "s", "f"):
        pass
    with pytest.raises(StoreError, match="another search.*--study"), open_study(url, "s", "g"):
        pass
    with open_study(url, "other", "g"):
        pass


def test_study_that_is_not_ours_is_refused(url: str) -> None:
    study = optuna.create_study(storage=url, study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study._storage.remove_session()
    with pytest.raises(StoreError, match="another search"), open_study(url, "s", "f"):
        pass


def read_rows(url: str) -> list[TrialRow]:
    with open_study(url, "s", "f") as study:
        return finished_rows(study)


@pytest.mark.parametrize("damage", ["text", "head", "middle", "half"])
def test_damaged_file_is_refused_in_one_line(damage: str, url: str, tmp_path: Path) -> None:
    with open_study(url, "s", "f") as study:
        add_row(study, ROW)
    file = tmp_path / "study.db"
    content = bytearray(file.read_bytes())
    if damage == "text":
        content = bytearray(b"this is no database" * 100)
    elif damage == "half":
        content = content[: len(content) // 2]
    else:
        start = 0 if damage == "head" else 4096
        content[start : start + 4096 * 8] = b"\xff" * 4096 * 8
    file.write_bytes(content)
    with pytest.raises(StoreError, match="study.db cannot be used") as caught:
        read_rows(url)
    assert "\n" not in str(caught.value)


def test_storage_that_breaks_while_it_is_open_is_reported(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used"), open_study(url, "s", "f") as study:
        (tmp_path / "study.db").write_bytes(b"\xff" * 5000)
        study.ask()


def test_error_of_the_caller_passes_through(url: str) -> None:
    with pytest.raises(ValueError, match="mine"), open_study(url, "s", "f"):
        raise ValueError("mine")


def test_complete_trial_without_numbers_is_refused(url: str) -> None:
    with open_study(url, "s", "f") as study:
        study.tell(study.ask(), [1.0, 2.0])
        with pytest.raises(StoreError, match="trial 0 .* lacks its numbers"):
            finished_rows(study)


def test_row_of_a_measurement() -> None:
    def score(metric: str, value: float, stderr: float | None) -> Score:
        return Score(metric, value, "u", "minimize", stderr, 2, 8, 0.5, "x")

    scores = (score("kl", 0.2, 0.01), score("same_top", 0.8, 0.0), score("perplexity", 50.0, 1.0))
    counts = BitCount(4.0, 4.1, 6.0, 500, 1000)
    row = make_row(3, "knobs", "d", counts, Measured(scores, torch.tensor([0.25, 0.125])))
    assert (row.number, row.kl, row.kl_stderr, row.same_top) == (3, 0.2, 0.01, 0.8)
    assert (row.bits_per_weight, row.checkpoint_bytes) == (4.1, 1000)
    assert row.kl_per_window == (0.25, 0.125)


def test_duplicate_is_the_first_row_of_a_digest() -> None:
    rows = [ROW, replace(ROW, number=1)]
    assert find_duplicate(rows, "d0") is rows[0]
    assert find_duplicate(rows, "d9") is None

"""The loop of trials: measured once, handed back later, ended early where they are hopeless."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta
from optuna.trial import TrialState

from alphaquant.errors import ModelError, StoreError
from alphaquant.reports.notes import TrialNotes
from alphaquant.search.sampler import PlannedTrial
from alphaquant.spaces.config import load_config, resolve
from alphaquant.studies.loop import Proposal
from alphaquant.studies.program import Run, run_program
from alphaquant.studies.store.study import TrialRow

MakeRun = Callable[..., Run]


def carry_out(run: Run) -> Run:
    run_program(run)
    return run


def with_choice(run: Run, *columns: int, can_prune: bool = False) -> TrialRow | None:
    """The next trial: the columns in turn, by unit."""
    choice = np.resize(np.array(columns), len(run.problem.units))
    proposal = Proposal(run.proposer.spread(choice), "knobs", can_prune=can_prune)
    return run.loop.run(lambda trial: proposal, PlannedTrial({}, {"origin": "knobs"}))


def test_finished_trials_are_handed_back_without_measuring_anything(make_run: MakeRun) -> None:
    first = carry_out(make_run(trials=20))
    told: list[int] = []
    again = carry_out(
        make_run(
            study=first.loop.study,
            trials=20,
            on_trial=lambda row: told.append(row.number),
        )
    )
    assert again.loop.rows == first.loop.rows
    assert told == []
    objective: Any = again.truth.objective
    assert all(n < objective.n_windows for _, n in objective.calls)  # the probe, which the log has
    longer = carry_out(
        make_run(
            study=first.loop.study,
            trials=22,
            on_trial=lambda row: told.append(row.number),
        )
    )
    assert longer.loop.rows[:20] == first.loop.rows
    assert told == [20, 21]


def test_all_stored_trials_come_back_even_if_fewer_are_asked_for(make_run: MakeRun) -> None:
    first = carry_out(make_run(trials=9))
    fewer = carry_out(make_run(study=first.loop.study, trials=4))
    assert fewer.loop.rows == first.loop.rows


def test_trial_of_another_program_is_refused(make_run: MakeRun) -> None:
    first = make_run()
    with_choice(first, 0)
    second = make_run(study=first.loop.study)
    with pytest.raises(StoreError, match="trial 0 .*'knobs' where this version has 'uniform:int2"):
        carry_out(second)


def test_study_whose_assignments_are_elsewhere_is_refused(
    make_run: MakeRun, tmp_path: Path
) -> None:
    first = make_run()
    with_choice(first, 0)
    with_choice(first, 1)
    with pytest.raises(StoreError, match="has 2 trials, and the assignments of 2 are not in"):
        make_run(study=first.loop.study, out=tmp_path / "other")


def test_hopeless_trial_ends_early_and_is_marked_in_both_places(make_run: MakeRun) -> None:
    run = make_run()
    better = with_choice(run, 1)
    # More bits, and mostly the cheapest format: worse on every window.
    worse = with_choice(run, 0, 0, 0, 4, can_prune=True)
    assert better is not None and worse is not None
    assert better.bits_per_weight <= worse.bits_per_weight
    assert better.kl < worse.kl
    assert (better.is_pruned, worse.is_pruned) == (False, True)
    assert (len(better.kl_per_window), len(worse.kl_per_window)) == (24, 8)
    assert worse.kl == pytest.approx(np.mean(worse.kl_per_window), rel=1e-6)
    states = [trial.state for trial in run.loop.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED]
    again = make_run(study=run.loop.study)
    assert with_choice(again, 1) == better
    assert with_choice(again, 0, 0, 0, 4) == worse


@pytest.mark.parametrize(
    ("columns", "can_prune"),
    [
        ((0, 0, 0, 4), False),  # planned trials are measured to their end
        ((0, 0, 0, 0), True),  # worse, but smaller than all before
        ((1, 1, 1, 4), True),  # better
    ],
)
def test_other_trials_are_measured_on_the_whole_text(
    columns: tuple[int, ...], can_prune: bool, make_run: MakeRun
) -> None:
    run = make_run()
    with_choice(run, 1)
    row = with_choice(run, *columns, can_prune=can_prune)
    assert row is not None
    assert not row.is_pruned
    assert len(row.kl_per_window) == 24


def test_pruned_trial_is_no_rival(make_run: MakeRun) -> None:
    run = make_run()
    with_choice(run, 1)
    pruned = with_choice(run, 0, 0, 0, 4, can_prune=True)
    assert pruned is not None
    run.loop.rows[:] = [pruned]
    row = with_choice(run, 0, 0, 4, can_prune=True)
    assert row is not None
    assert not row.is_pruned


def test_equal_assignment_takes_the_numbers_over(make_run: MakeRun) -> None:
    run = make_run()
    first, other, again = (with_choice(run, column) for column in (0, 1, 0))
    objective: Any = run.truth.objective
    assert first is not None and other is not None and again is not None
    assert len(objective.calls) == 2
    assert (first.duplicate_of, other.duplicate_of, again.duplicate_of) == (None, None, 0)
    own = {"number": 2, "duplicate_of": 0, "seconds": 0.0}
    assert asdict(again) == {**asdict(first), **own}


@pytest.mark.parametrize("n_trials", [1, 3])
def test_no_trial_runs_beyond_the_number_asked_for(n_trials: int, make_run: MakeRun) -> None:
    run = make_run(trials=n_trials)
    rows = [with_choice(run, column % 5) for column in range(n_trials + 2)]
    assert [row is None for row in rows] == [False] * n_trials + [True, True]
    assert len(run.loop.study.trials) == n_trials
    assert run.loop.is_over


def test_no_trial_starts_after_the_deadline_but_one_always_runs(make_run: MakeRun) -> None:
    run = make_run(trials=5, time_limit="2h")
    run.loop.deadline = time.monotonic() - 1
    assert run_program(run).stopped == "the time limit of 2h is over"
    assert len(run.loop.rows) == 1


def test_no_trial_starts_after_the_timeout_but_one_always_runs(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(timeout=0, trials=5)
    assert not run.loop.is_over
    with caplog.at_level(logging.WARNING):
        rows = [with_choice(run, column) for column in range(3)]
    assert [row is None for row in rows] == [False, True, True]
    assert caplog.text.count("the timeout of 0 s is over; trials so far: 1") == 1


def test_model_that_broke_down_is_an_error_and_no_trial(make_run: MakeRun) -> None:
    run = make_run()
    objective: Any = run.truth.objective
    objective.kl = lambda assignment: float("nan")
    with pytest.raises(ModelError, match="KL of knobs at .* bits is nan; use --dtype float32"):
        with_choice(run, 0)
    assert run.loop.rows == []
    assert [t.state for t in run.loop.study.trials] == [TrialState.RUNNING]


def test_every_trial_has_its_configuration_as_an_artifact(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    run.loop.show = TrialNotes(run.spec, run.proposer.space.inventory, run.loop.folder)
    for columns in ((0,), (1, 2), (0,)):
        with_choice(run, *columns)
    store = FileSystemArtifactStore(run.loop.folder.path / "artifacts")
    study: optuna.Study = run.loop.study
    for row, trial in zip(run.loop.rows, study.trials, strict=True):
        (meta,) = get_all_artifact_meta(trial, storage=study._storage)
        path = tmp_path / f"{trial.number}.json"
        download_artifact(artifact_store=store, file_path=str(path), artifact_id=meta.artifact_id)
        config = load_config(path)
        found = resolve(config, run.proposer.space.inventory, strict=True).assignment
        assert found == run.loop.assignment(row)
        summary: Any = config.summary
        assert summary["assignment_digest"] == row.digest
        assert summary["evaluation"]["kl"] == row.kl

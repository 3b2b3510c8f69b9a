"""Proposals that survive a kill: interrupted studies go on as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from alphaquant.errors import ConfigError
from alphaquant.search import sampler as sampler_module
from alphaquant.search.knobs import Knobs, knob_params, suggest_knobs
from alphaquant.search.sampler import (
    FINISHED,
    SAMPLERS,
    PlannedTrial,
    fail_stale_trials,
    make_sampler,
    next_trial,
)

PLANNED = (
    PlannedTrial(knob_params(Knobs(4.25)), {"allocator": "blend"}),
    PlannedTrial(knob_params(Knobs(3.0, error_weight=0.0)), {"allocator": "fisher"}),
    PlannedTrial({"bits": 3.5}, {"allocator": "sampled at 3.5"}),
)
Open = Callable[[], optuna.Study]


@pytest.fixture(params=["memory", "sqlite"])
def open_study(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens one and the same study anew, as a process that takes it over would."""
    in_memory = optuna.storages.InMemoryStorage()

    def open_one() -> optuna.Study:
        on_disk = f"sqlite:///{tmp_path / 'study.db'}"
        storage = in_memory if request.param == "memory" else on_disk
        return optuna.create_study(
            study_name="s",
            storage=storage,
            load_if_exists=True,
            directions=["minimize", "minimize"],
        )

    return open_one


def _next(study: optuna.Study, name: str, pin: dict[str, float]) -> optuna.Trial:
    """The plan's next trial, then sampled ones."""
    n_finished = len(study.get_trials(states=FINISHED))
    fixed = PLANNED[n_finished] if n_finished < len(PLANNED) else PlannedTrial(pin)
    return next_trial(study, fixed, name, 7)


def _run(study: optuna.Study, name: str, n_trials: int, pin: dict[str, float]) -> None:
    for _ in range(n_trials):
        trial = _next(study, name, pin)
        knobs = suggest_knobs(trial, 2.5, 4.25)
        divergence = 4.0**-knobs.bits * (1 + (knobs.error_weight - 0.3) ** 2)
        study.tell(trial, [knobs.bits, divergence * (1 + knobs.depth_slope**2)])


def _params(study: optuna.Study) -> list[dict[str, float]]:
    return [t.params for t in study.get_trials(states=(TrialState.COMPLETE,))]


def _fresh_run(name: str, n_trials: int, pin: dict[str, float]) -> list[dict[str, float]]:
    study = optuna.create_study(directions=["minimize", "minimize"])
    _run(study, name, n_trials, pin)
    return _params(study)


@pytest.mark.parametrize(
    ("name", "pin"),
    [("random", {}), ("nsga2", {}), ("tpe", {}), ("tpe", {"bits": 3.25})],
)
def test_an_interrupted_study_proposes_what_an_uninterrupted_one_does(
    open_study: Open, name: str, pin: dict[str, float]
) -> None:
    _run(open_study(), name, 5, pin)
    killed = _next(open_study(), name, pin)
    suggest_knobs(killed, 2.5, 4.25)
    study = open_study()
    assert fail_stale_trials(study) == 1
    _run(study, name, 7, pin)
    assert _params(study) == _fresh_run(name, 12, pin)


def test_a_kill_before_gp_models_changes_nothing() -> None:
    # One storage and one modelled trial: each takes GP about two seconds of a core.
    study = optuna.create_study(directions=["minimize", "minimize"])
    _run(study, "gp", 10, {"bits": 3.25})
    _next(study, "gp", {"bits": 3.25})
    fail_stale_trials(study)
    _run(study, "gp", 1, {"bits": 3.25})
    assert _params(study) == _fresh_run("gp", 11, {"bits": 3.25})
    assert set(SAMPLERS) == {"random", "nsga2", "tpe", "gp"}, "test the new sampler too"


@pytest.mark.parametrize("is_failed", [True, False], ids=["failed", "still running"])
def test_a_kill_after_tpe_started_to_model_changes_nothing(
    open_study: Open, is_failed: bool
) -> None:
    _run(open_study(), "tpe", 11, {})
    suggest_knobs(_next(open_study(), "tpe", {}), 2.5, 4.25)
    study = open_study()
    if is_failed:
        fail_stale_trials(study)
    _run(study, "tpe", 2, {})
    assert _params(study) == _fresh_run("tpe", 13, {})


def test_a_kill_at_a_new_generation_changes_nothing(
    open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_POPULATION_SIZE", 4)
    for n_trials in (6, 1, 1, 1, 1, 1):
        _run(open_study(), "nsga2", n_trials, {})
        suggest_knobs(_next(open_study(), "nsga2", {}), 2.5, 4.25)
        fail_stale_trials(open_study())
    assert _params(open_study()) == _fresh_run("nsga2", 11, {})


def test_planned_trials_come_first_with_their_attributes(open_study: Open) -> None:
    study = open_study()
    _run(study, "tpe", 4, {})
    trials = study.get_trials()
    assert [t.params for t in trials[:2]] == [dict(p.params) for p in PLANNED[:2]]
    assert trials[2].params["bits"] == 3.5
    assert trials[2].params["error_weight"] != Knobs(3.5).error_weight
    names = ["blend", "fisher", "sampled at 3.5", None]
    assert [t.user_attrs.get("allocator") for t in trials] == names


def test_a_planned_trial_that_a_kill_left_waiting_runs_once(open_study: Open) -> None:
    _run(open_study(), "random", 1, {})
    open_study().enqueue_trial(dict(PLANNED[1].params))
    study = open_study()
    assert fail_stale_trials(study) == 1
    _run(study, "random", 3, {})
    assert _params(study) == _fresh_run("random", 4, {})
    assert [t.state for t in study.trials].count(TrialState.WAITING) == 0


def test_a_queue_that_nobody_cleared_does_not_shift_the_plan(
    open_study: Open, caplog: pytest.LogCaptureFixture
) -> None:
    study = open_study()
    study.enqueue_trial({"bits": 2.6})
    _run(study, "random", 4, {})
    assert _params(study) == _fresh_run("random", 4, {})
    assert "failed 1 trials that waited" in caplog.text


def test_pinned_parameters_stay_and_the_others_vary(open_study: Open) -> None:
    study = open_study()
    _run(study, "tpe", 14, {"bits": 3.25})
    sampled = _params(study)[len(PLANNED) :]
    assert {p["bits"] for p in sampled} == {3.25}
    assert len({p["error_weight"] for p in sampled}) == len(sampled)


def test_seeds_and_counts_give_different_proposals() -> None:
    def first_draw(seed: int, n_complete: int) -> float:
        study = optuna.create_study(sampler=make_sampler("random", seed, n_complete))
        return study.ask().suggest_float("x", 0, 1)

    draws = [first_draw(seed, n) for seed in range(3) for n in range(3)]
    assert len(set(draws)) == 9
    assert draws[0] == first_draw(0, 0)


def test_finished_trials_are_not_stale(open_study: Open) -> None:
    _run(open_study(), "random", 2, {})
    assert fail_stale_trials(open_study()) == 0
    assert len(_params(open_study())) == 2


def test_unknown_samplers_and_negative_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="'cma'; use one of tpe, gp, nsga2, random"):
        make_sampler("cma", 0, 0)
    with pytest.raises(ConfigError, match="seed -1 is negative"):
        make_sampler("tpe", -1, 0)


def test_pruned_trials_count_as_finished(open_study: Open) -> None:
    study = open_study()
    for _ in range(3):
        trial = _next(study, "random", {})
        suggest_knobs(trial, 2.5, 4.25)
        study.tell(trial, state=TrialState.PRUNED)
    assert fail_stale_trials(study) == 0
    assert _next(study, "random", {}).user_attrs == {}, "the plan is behind it"

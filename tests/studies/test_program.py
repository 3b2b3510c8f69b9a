"""Programs: which steps run, in which order, and what each of them proposes."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.search.allocators import available
from alphaquant.search.groups import make_groups
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.studies.program import (
    N_UNIFORM,
    Run,
    rank_correlation,
    run_allocators,
    run_groups,
    run_knobs,
    run_probe,
    run_program,
    run_sizes,
    run_uniform,
)
from alphaquant.studies.sizing import EFFORTS
from alphaquant.studies.stopping import MOST_TRIALS
from alphaquant.studies.trials import uniform_fits

MakeRun = Callable[..., Run]
EFFORT = EFFORTS["default"]
PROBE_WINDOWS = EFFORT.probe_tokens // 256
LIMITS = [
    {"max_formats_per_layer": 1},
    {"layer_minimum_bits": 3.6},
    {"active_budget": "7600bytes"},
    {"max_formats_per_layer": 2, "layer_minimum_bits": 3.3, "active_budget": "8300bytes"},
]


def kinds(run: Run) -> list[str]:
    """Kinds of trials in order, each once."""
    return [kind for kind, _ in groupby(row.origin.split(":")[0] for row in run.loop.rows)]


def formats_of_experts(run: Run, assignment: Assignment, layer: int) -> set[str]:
    matrices = run.proposer.space.inventory.matrices
    inside = [m for m in matrices if m.kind == "expert" and m.layer == layer]
    return {assignment.formats[m.name] for m in inside}


START = ["uniform", "knobs", "size"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [*START, "knobs"]),
        ({"allocators": "all"}, ["uniform", "knobs", "allocator", "size", "knobs"]),
        ({"mode": "groups"}, [*START, "groups"]),
    ],
)
def test_every_mode_runs_its_steps_in_order_to_the_last_trial(
    changes: dict[str, str], expected: list[str], make_run: MakeRun
) -> None:
    run = make_run(trials=45, **changes)
    found = run_program(run)
    assert found.probe is not None
    assert found.stopped == "all 45 trials of --trials or --effort are done"
    assert kinds(run) == expected
    assert len(run.loop.rows) == 45


def test_one_allocator_runs_beside_uniform_alone(make_run: MakeRun) -> None:
    run = make_run(allocator="error")
    run_program(run)
    assert [row.origin for row in run.loop.rows] == [
        *("uniform:int2-g32", "uniform:int3-g32-asym", "allocator:error")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"allocators": "error,evolution"},
        {"allocator": "error"},
        {"max_formats_per_layer": 2},
        {"trials": 6},
    ],
)
def test_trials_that_are_known_before_any_is_run_are_measured_together(
    changes: dict[str, Any], make_run: MakeRun
) -> None:
    run = make_run(**{"trials": 20, **changes})
    run_program(run)
    objective: Any = run.truth.objective
    planned, n_windows = objective.together[0]
    sampled = {row.number for row in run.loop.rows if row.origin in ("knobs", "groups")}
    sampled -= {min(sampled, default=0)}  # the first is the default
    unknown = {row.number for row in run.loop.rows if row.origin == "allocator:evolution"}
    rows = [row for row in run.loop.rows if row.number not in sampled | unknown]
    assert planned == [row.digest for row in rows]
    assert n_windows == objective.n_windows
    assert objective.calls[0][0] == planned[0]


def test_what_a_study_has_is_not_measured_together_again(make_run: MakeRun) -> None:
    first = make_run(trials=5)
    run_program(first)
    again = make_run(trials=9, study=first.loop.study)
    run_program(again)
    objective: Any = again.truth.objective
    assert objective.together == [([row.digest for row in again.loop.rows[5:9]], 24)]
    timed = make_run(timeout=1000.0, trials=4)
    run_program(timed)
    late: Any = timed.truth.objective
    assert late.together == []


def test_uniform_formats_are_the_three_of_least_predicted_cost_that_fit(make_run: MakeRun) -> None:
    menu = ("int1-g32", "int2-g32", "int3-g32-asym", "int4-g64", "mxfp4", "int8-row")
    run = make_run(budget="5bits", menu=menu)
    run_uniform(run)
    names = [row.origin.removeprefix("uniform:") for row in run.loop.rows]
    space, total = run.proposer.space, run.proposer.base_cost.sum(axis=0).tolist()
    predicted = dict(zip(space.menu, total, strict=True))
    fitting = [name for name in space.menu if uniform_fits(space, name)]
    chosen = sorted(fitting, key=lambda name: predicted[name])[:N_UNIFORM]
    assert names == [name for name in space.menu if name in chosen]
    assert len(fitting) == 5 > N_UNIFORM
    assert predicted["int8-row"] < predicted[chosen[0]]


def test_allocators_are_those_of_a_list_or_all_that_no_other_step_covers(
    make_run: MakeRun,
) -> None:
    listed = make_run(allocators="error, utilization,evolution", trials=5)
    run_allocators(listed)
    assert [row.origin.split(":")[1] for row in listed.loop.rows] == [
        *("error", "utilization", "evolution")
    ]
    every = make_run(allocators="all")
    run_allocators(every)
    names = {row.origin.split(":")[1] for row in every.loop.rows}
    assert names == set(available(every.problem)) - {"uniform", "random", "blend"}
    none = make_run()
    run_allocators(none)
    assert none.loop.rows == []


@pytest.mark.parametrize("mode", ["knobs", "groups"])
def test_without_a_number_sampling_ends_where_more_is_not_worth_it_and_resumes_to_the_same(
    mode: str, make_run: MakeRun
) -> None:
    run = make_run(mode=mode)
    found = run_program(run)
    assert "4 more are expected to lower the KL by" in found.stopped
    n_trials = len(run.loop.rows)
    assert n_trials < MOST_TRIALS
    again = make_run(mode=mode, study=run.loop.study)
    assert run_program(again) == found
    assert again.loop.rows == run.loop.rows
    longer = make_run(mode=mode, study=run.loop.study, trials=n_trials + 3)
    assert run_program(longer).stopped == (
        f"all {n_trials + 3} trials of --trials or --effort are done"
    )
    assert longer.loop.rows[:n_trials] == run.loop.rows
    after = make_run(mode=mode, study=run.loop.study)
    run_program(after)
    assert len(after.loop.rows) >= n_trials + 3


def test_evolution_is_one_trial_that_is_no_worse_than_what_it_measured(make_run: MakeRun) -> None:
    run = make_run(allocator="evolution", trials=20)
    run_program(run)
    *uniform, evolved = run.loop.rows
    assert evolved.origin == "allocator:evolution"
    assert evolved.kl < min(row.kl for row in uniform)
    assert evolved.bits_per_weight <= 4.0


def test_trials_run_out_in_the_middle_of_a_step(make_run: MakeRun) -> None:
    run = make_run(trials=7)
    assert run_program(run).probe is None
    assert kinds(run) == START
    assert len(run.loop.rows) == 7


def test_levels_are_sizes_over_the_whole_menu_and_only_they_may_be_above_the_budget(
    make_run: MakeRun,
) -> None:
    run = make_run(trials=60, budget="3.6bits")
    run_program(run)
    levels = [row.bits_per_weight for row in run.loop.rows if row.origin == "size"]
    assert len(levels) == EFFORT.n_front_sizes
    assert levels == sorted(levels, reverse=True)
    assert run.proposer.bits_low < levels[-1] < 3.6 < levels[0] < run.proposer.bits_most
    above = {row.origin for row in run.loop.rows if row.bits_per_weight > 3.6}
    assert above == {"size"}


def test_best_is_within_the_budget_even_where_a_level_above_is_better(make_run: MakeRun) -> None:
    run = make_run(budget="3bits")
    run_uniform(run)
    run_sizes(run)
    assert min(row.kl for row in run.loop.rows) < run.best().kl
    assert run.best().bits_per_weight <= 3.0


def test_probe_measures_random_assignments_within_the_budget_on_part_of_the_text(
    make_run: MakeRun,
) -> None:
    run = make_run()
    probe = run_probe(run)
    objective: Any = run.truth.objective
    assert [n for _, n in objective.calls] == [PROBE_WINDOWS] * EFFORT.n_probes
    assert len({digest for digest, _ in objective.calls}) == EFFORT.n_probes
    assert run.loop.rows == []
    assert probe is not None
    assert (probe.n_assignments, probe.n_windows) == (EFFORT.n_probes, PROBE_WINDOWS)
    assert probe.spearman.keys() == {"fisher", "error", "default"}
    assert all(0.0 < value < 1.0 for value in probe.spearman.values())
    assert run_probe(make_run()) == probe


def test_a_quick_search_measures_no_random_assignments(make_run: MakeRun) -> None:
    run = make_run(effort="quick")
    objective: Any = run.truth.objective
    assert run_probe(run) is None
    assert objective.calls == []


def test_probe_of_a_budget_that_leaves_no_choice_says_nothing(make_run: MakeRun) -> None:
    bits = make_run().proposer.bits_low
    run = make_run(budget=f"{math.nextafter(bits, 9)!r}bits")
    probe = run_probe(run)
    assert probe is not None
    assert all(math.isnan(value) for value in probe.spearman.values())


def test_rank_correlation_counts_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
    # d = (1, -1, 0): 1 - 6 * 2 / (3 * 8)
    assert rank_correlation([1, 2, 3], [20, 10, 30]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    assert math.isnan(rank_correlation([1, 2], [3, 3]))


def test_three_of_four_sampled_knobs_are_at_the_full_budget(make_run: MakeRun) -> None:
    run = make_run(trials=12)
    run_knobs(run)
    bits = [trial.params["bits"] for trial in run.loop.study.trials]
    is_full = [value == run.proposer.bits_high for value in bits]
    assert is_full == [False, True, True, True] * 3


@pytest.mark.parametrize("grouping", ["layer", "utilization"])
def test_units_of_a_group_share_a_format(grouping: str, make_run: MakeRun) -> None:
    run = make_run(mode="groups", grouping=grouping, trials=12)
    run_groups(run)
    groups = make_groups(run.problem, grouping)
    assert len(groups.names) < len(run.problem.units)
    for row in run.loop.rows:
        choice = run.proposer.choice(run.loop.assignment(row))
        assert choice is not None
        for group in range(len(groups.names)):
            assert len(set(choice[groups.members == group])) == 1
        assert row.bits_per_weight <= 4.0
    assert len({row.digest for row in run.loop.rows}) > 3


@pytest.mark.parametrize("limits", LIMITS)
def test_every_trial_keeps_the_side_constraints(limits: dict[str, Any], make_run: MakeRun) -> None:
    run = make_run(trials=20, **limits)
    run_program(run)
    inventory = run.proposer.space.inventory
    for row in run.loop.rows:
        assignment = run.loop.assignment(row)
        bits = {m.name: m.storage_bits(assignment.format_of(m.name)) for m in inventory.matrices}
        for layer in range(2):
            inside = [m for m in inventory.matrices if m.layer == layer]
            mean = sum(bits[m.name] for m in inside) / sum(m.n_weights for m in inside)
            assert mean >= limits.get("layer_minimum_bits", 0.0)
            n_formats = len(formats_of_experts(run, assignment, layer))
            assert n_formats <= limits.get("max_formats_per_layer", 9)
        read = sum(bits[m.name] * (2 / 3 if m.kind == "expert" else 1) for m in inventory.matrices)
        if "active_budget" in limits:
            assert read <= 8 * parse_budget(str(limits["active_budget"])).value * (1 + 1e-12)
    assert kinds(run)[-1] == "knobs"
    assert len({row.digest for row in run.loop.rows}) > 5


def test_an_allocator_that_breaks_a_side_constraint_is_an_error_alone_and_left_out_among_others(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    constrained = make_run(allocator="random", max_formats_per_layer=1, layer_minimum_bits=2.6)
    with pytest.raises(ConfigError, match="random knows the budget only.*max_formats_per_layer"):
        run_program(constrained)
    limits = {"max_formats_per_layer": 1, "layer_minimum_bits": 2.6}
    among = make_run(allocators="all", **limits)
    run_allocators(among)
    left_out = [r.message for r in caplog.records if "is left out" in r.message]
    n_run = sum(row.origin.startswith("allocator:") for row in among.loop.rows)
    assert left_out and n_run + len(left_out) == len(available(among.problem)) - 3

"""Programs: which steps run, in which order, and what each of them proposes."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from alphaquant.errors import ConfigError
from alphaquant.search.allocators import available
from alphaquant.search.blocks import Block, BlockGrid
from alphaquant.search.groups import make_groups
from alphaquant.search.sweep import SweepPoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.studies.program import (
    N_FRONT_LEVELS,
    N_PROBES,
    PROBE_WINDOWS,
    Run,
    program_of,
    rank_correlation,
    run_allocators,
    run_default,
    run_groups,
    run_knobs,
    run_levels,
    run_polish,
    run_probe,
    run_relinearize,
    run_sweep,
    run_uniform,
    sweep_weights,
)
from alphaquant.studies.result import Probe

MakeRun = Callable[..., Run]
LIMITS = [
    {"max_formats_per_layer": 1},
    {"layer_minimum_bits": 3.6},
    {"active_budget": "7600bytes"},
    {"max_formats_per_layer": 2, "layer_minimum_bits": 3.3, "active_budget": "8300bytes"},
]


def carry_out(run: Run) -> Run:
    """Run all steps."""
    for step in program_of(run.spec):
        step(run)
    return run


def kinds(run: Run) -> list[str]:
    """Kinds of trials in order, each once."""
    return [kind for kind, _ in groupby(row.origin.split(":")[0] for row in run.loop.rows)]


def formats_of_experts(run: Run, assignment: Assignment, layer: int) -> set[str]:
    matrices = run.proposer.space.inventory.matrices
    inside = [m for m in matrices if m.kind == "expert" and m.layer == layer]
    return {assignment.formats[m.name] for m in inside}


START = ["uniform", "knobs", "allocator", "level"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sweep": "always"},
            [*START, "sweep", "surrogate", "relinearize", "polish", "knobs"],
        ),
        ({"sweep": "never"}, [*START, "surrogate", "relinearize", "polish", "knobs"]),
        ({"mode": "knobs"}, [*START, "knobs"]),
        ({"mode": "groups"}, [*START, "groups"]),
    ],
)
def test_every_mode_runs_its_steps_in_order_to_the_last_trial(
    changes: dict[str, str], expected: list[str], make_run: MakeRun
) -> None:
    run = carry_out(make_run(trials=45, **changes))
    assert kinds(run) == expected
    assert len(run.loop.rows) == 45
    assert run.probe is not None


def test_one_allocator_runs_beside_uniform_alone(make_run: MakeRun) -> None:
    run = carry_out(make_run(allocator="error"))
    assert [row.origin for row in run.loop.rows] == [
        *("uniform:int2-g32", "uniform:int3-g32-asym", "allocator:error")
    ]


def test_evolution_is_one_trial_that_is_no_worse_than_what_it_measured(make_run: MakeRun) -> None:
    run = carry_out(make_run(allocator="evolution", trials=20))
    *uniform, evolved = run.loop.rows
    assert evolved.origin == "allocator:evolution"
    assert evolved.kl < min(row.kl for row in uniform)
    assert evolved.bits_per_weight <= 4.0


def test_trials_run_out_in_the_middle_of_a_step(make_run: MakeRun) -> None:
    run = carry_out(make_run(trials=7))
    assert kinds(run) == START
    assert len(run.loop.rows) == 7
    assert run.probe is None


def test_levels_are_sizes_over_the_whole_menu_and_only_they_may_be_above_the_budget(
    make_run: MakeRun,
) -> None:
    run = carry_out(make_run(trials=60, sweep="always", budget="3.6bits"))
    levels = [row.bits_per_weight for row in run.loop.rows if row.origin == "level"]
    assert len(levels) == N_FRONT_LEVELS
    assert levels == sorted(levels, reverse=True)
    assert run.proposer.bits_low < levels[-1] < 3.6 < levels[0] < run.proposer.bits_most
    above = {row.origin for row in run.loop.rows if row.bits_per_weight > 3.6}
    assert above == {"level", "sweep"}


def test_best_is_within_the_budget_even_where_a_level_above_is_better(make_run: MakeRun) -> None:
    run = make_run(budget="3bits")
    run_uniform(run)
    run_levels(run)
    assert min(row.kl for row in run.loop.rows) < run.best().kl
    assert run.best().bits_per_weight <= 3.0
    choice = run.proposer.choice(run.loop.assignment(run.best()))
    assert choice is not None
    np.testing.assert_array_equal(run.best_choice(), choice)


def test_probe_measures_random_assignments_within_the_budget_on_part_of_the_text(
    make_run: MakeRun,
) -> None:
    run = make_run()
    run_probe(run)
    objective: Any = run.truth.objective
    assert [n for _, n in objective.calls] == [PROBE_WINDOWS] * N_PROBES
    assert len({digest for digest, _ in objective.calls}) == N_PROBES
    assert run.loop.rows == []
    assert run.probe is not None
    assert (run.probe.n_assignments, run.probe.n_windows) == (N_PROBES, PROBE_WINDOWS)
    assert run.probe.spearman.keys() == {"fisher", "error", "default"}
    assert all(0.0 < value < 1.0 for value in run.probe.spearman.values())
    again = make_run()
    run_probe(again)
    assert again.probe == run.probe


def test_probe_of_a_budget_that_leaves_no_choice_says_nothing(make_run: MakeRun) -> None:
    bits = make_run().proposer.bits_low
    run = make_run(budget=f"{math.nextafter(bits, 9)!r}bits")
    run_probe(run)
    assert run.probe is not None
    assert all(math.isnan(value) for value in run.probe.spearman.values())


def test_rank_correlation_counts_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
    # d = (1, -1, 0): 1 - 6 * 2 / (3 * 8)
    assert rank_correlation([1, 2, 3], [20, 10, 30]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    assert math.isnan(rank_correlation([1, 2], [3, 3]))


@pytest.mark.parametrize(
    ("sweep", "spearman", "is_swept"),
    [
        ("always", 0.99, True),
        ("never", 0.1, False),
        ("auto", 0.95, False),
        ("auto", 0.5, True),
        ("auto", math.nan, False),
        ("auto", None, False),
    ],
)
def test_sweep_runs_as_asked_or_where_the_costs_rank_badly(
    sweep: str, spearman: float | None, is_swept: bool, make_run: MakeRun
) -> None:
    run = make_run(sweep=sweep)
    run_uniform(run)
    if spearman is not None:
        run.probe = Probe(1, 1, {"default": spearman, "fisher": 1.0})
    run_sweep(run)
    assert bool(run.sweep) is is_swept
    assert ("sweep" in kinds(run)) is is_swept


def test_sweep_finds_that_the_first_layers_experts_deserve_more(make_run: MakeRun) -> None:
    run = make_run(sweep="always")
    run_default(run)
    run_sweep(run)
    units = run.problem.units
    is_first = np.array([u.kind == "expert" and u.layer == 0 for u in units])
    is_other = np.array([u.kind == "expert" and u.layer == 1 for u in units])
    assert run.weights[is_first].mean() > 1.5 * run.weights[is_other].mean()
    default, sweep = run.loop.rows[0], run.loop.rows[1]
    assert sweep.origin == "sweep"
    assert sweep.kl < default.kl


@pytest.mark.parametrize(("budget", "n_starts"), [("3bits", 1), ("2.45bits", 2)])
def test_small_budgets_are_swept_from_both_ends(
    budget: str, n_starts: int, make_run: MakeRun
) -> None:
    run = make_run(budget=budget, sweep="always", menu=("int1-g32", "int2-g32", "int8-row"))
    run_uniform(run)
    run_sweep(run)
    bits = [point.bits for point in run.sweep]
    assert bits == sorted(bits)
    # Both ends are in every walk.
    assert bits.count(bits[0]) == bits.count(bits[-1]) == n_starts


def block(name: int, bits: tuple[int, ...]) -> Block:
    zeros = np.zeros((len(bits), 1), dtype=np.int64)
    cost = np.arange(len(bits), dtype=np.float64)
    return Block(0, "expert", np.array([name]), zeros, np.array(bits), cost)


GRID = BlockGrid((block(0, (64, 32)), block(1, (64, 32))), np.array([1.0, 4.0]))


def state(levels: tuple[int, int], bits: int, kl: float) -> SweepPoint:
    return SweepPoint(np.array(levels), bits, np.array([0.9 * kl, 1.1 * kl]))


@pytest.mark.parametrize(
    ("kl_above", "expected"),
    [
        # 16 bits above on 8 weights count as a factor of 16.
        (0.07, [2.0, 0.5]),
        (0.05, [0.5, 2.0]),
    ],
)
def test_weights_are_those_of_the_best_state_near_the_size(
    kl_above: float, expected: list[float]
) -> None:
    points = (
        state((0, 1), 100, 1.0),
        state((1, 0), 116, kl_above),
        state((0, 0), 120, 9.0),
        state((1, 1), 80, 99.0),
        state((1, 1), 40, 0.0),  # the best, and fifth from the size
    )
    found = sweep_weights(GRID, points, 100, 8.0)
    np.testing.assert_allclose(found, expected)


def expert_ratios(run: Run) -> list[float]:
    """By layer, how much more the surrogate takes experts to cost than the base cost does."""
    surrogate, base, units = run.surrogate(), run.proposer.base_cost, run.problem.units
    inside = [[u.kind == "expert" and u.layer == layer for u in units] for layer in range(2)]
    return [float(surrogate[rows].sum() / base[rows].sum()) for rows in inside]


def test_surrogate_learns_where_costs_are_wrong_from_complete_trials_alone(
    make_run: MakeRun,
) -> None:
    run = carry_out(make_run(trials=13, mode="knobs"))
    first, other = expert_ratios(run)
    assert first > 1.2 * other
    run.loop.rows.append(replace(run.loop.rows[0], kl=1e9, is_pruned=True))
    assert expert_ratios(run) == [first, other]


def start_poorly(run: Run) -> None:
    """One trial, the largest uniform format that fits."""
    run.fixed(run.proposer.uniform("int3-g32-asym"))


def count_anchors(run: Run) -> list[str]:
    """The anchors that are measured from now on."""
    anchors, measure = [], run.anchor_costs

    def counted(anchor: Assignment) -> object:
        anchors.append(anchor.digest)
        return measure(anchor)

    run.anchor_costs = counted  # type: ignore[assignment]
    return anchors


def test_relinearize_goes_on_from_a_better_assignment_and_stops_when_there_is_none(
    make_run: MakeRun,
) -> None:
    run = make_run()
    start_poorly(run)
    anchors = count_anchors(run)
    run_relinearize(run)
    first, better, last = run.loop.rows
    assert better.kl < first.kl
    assert anchors == [first.digest, better.digest]
    assert last.duplicate_of == better.number


def test_relinearize_stops_at_once_when_its_optimum_is_worse(make_run: MakeRun) -> None:
    bits = make_run().problem.bits.astype(np.float64)
    run = make_run(anchor_costs=bits)  # the fewer the bits the better
    start_poorly(run)
    anchors = count_anchors(run)
    run_relinearize(run)
    assert len(anchors) == 1
    assert run.best().number == 0
    assert [row.origin for row in run.loop.rows] == ["uniform:int3-g32-asym", "relinearize"]


def test_polish_improves_the_best_within_the_budget(make_run: MakeRun) -> None:
    run = make_run()
    start_poorly(run)
    run_polish(run)
    start, polished = run.loop.rows
    assert polished.origin == "polish"
    assert polished.kl < start.kl
    assert polished.bits_per_weight <= 4.0


def test_three_of_four_sampled_knobs_are_at_the_full_budget(make_run: MakeRun) -> None:
    run = make_run(trials=12, mode="knobs")
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


@pytest.mark.parametrize("mode", ["auto", "knobs"])
@pytest.mark.parametrize("limits", LIMITS)
def test_every_trial_keeps_the_side_constraints(
    limits: dict[str, Any], mode: str, make_run: MakeRun
) -> None:
    run = carry_out(make_run(trials=40, sweep="always", mode=mode, **limits))
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
    found = kinds(run)
    assert found[-1] == "knobs"
    assert "polish" not in found
    assert len({row.digest for row in run.loop.rows}) > 5


def test_an_allocator_that_breaks_a_side_constraint_is_an_error_alone_and_left_out_among_others(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    constrained = make_run(allocator="random", max_formats_per_layer=1, layer_minimum_bits=2.6)
    with pytest.raises(ConfigError, match="random knows the budget only.*max_formats_per_layer"):
        carry_out(constrained)
    among = make_run(max_formats_per_layer=1, layer_minimum_bits=2.6)
    run_allocators(among)
    left_out = [r.message for r in caplog.records if "is left out" in r.message]
    n_run = sum(row.origin.startswith("allocator:") for row in among.loop.rows)
    assert left_out and n_run + len(left_out) == len(available(among.problem)) - 3

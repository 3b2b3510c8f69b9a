"""Stages before the study: cached by content, in order, with progress that adds up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaquant.costs.fisher import CostSettings, gradients_key
from alphaquant.errors import ConfigError
from alphaquant.evaluators.divergence import Divergence
from alphaquant.progress import StageClock, no_progress
from alphaquant.search.allocators import ALLOCATORS, available
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.specs.flat import replaced
from alphaquant.specs.search import SearchSpec
from alphaquant.studies import costing
from alphaquant.studies.costing import bank_formats, measure_unit_costs, open_filled_bank
from alphaquant.studies.inputs import load_source
from alphaquant.studies.preparing import Prepared, prepare, problem_of
from alphaquant.studies.sizing import sized
from alphaquant.studies.stages import LOAD_STEPS, Inputs, load_inputs, store_teachers

MakeSpec = Callable[..., SearchSpec]


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> SearchSpec:
    return make_spec(tmp_path / "out")


@pytest.fixture
def inputs(spec: SearchSpec) -> Inputs:
    return load_inputs(spec, load_source(spec.checkpoint.model, "cpu", "auto"))


@pytest.fixture
def space(inputs: Inputs, spec: SearchSpec) -> SearchSpace:
    profile = find_profile("any")
    menu, budget = menu_of(spec.limits.formats, profile), parse_budget(spec.limits.budget)
    return make_space(inputs.source.map.inventory, profile, menu, budget)


def test_open_sizes_are_those_of_the_effort(make_spec: MakeSpec, tmp_path: Path) -> None:
    asked = make_spec(tmp_path / "out", evaluation_samples=None, effort="quick")
    source = load_source(asked.checkpoint.model, "cpu", "auto", cache=asked.run.cache)
    expected = sized(asked, source.map).texts.evaluation_samples
    assert len(load_inputs(asked, source).evaluation.tokens) == expected == -(-(2**13) // 48)


def test_texts_have_their_roles_and_counts(inputs: Inputs, spec: SearchSpec) -> None:
    facts = inputs.text_facts()
    assert {role: text["n_samples"] for role, text in facts.items()} == {
        "calibration": 12,
        "search": 6,
        "heldout": 6,
    }
    assert inputs.digests()["heldout_text"] == inputs.heldout.digest
    calls: list[tuple[str, int, int]] = []
    other = load_inputs(replaced(spec, seed=1), inputs.source, lambda *call: calls.append(call))
    assert calls == [("load", n, LOAD_STEPS) for n in range(LOAD_STEPS - 3, LOAD_STEPS)]
    assert other.digests()["evaluation_text"] != inputs.digests()["evaluation_text"]


def test_bank_holds_menu_and_reference_formats_by_bits(space: SearchSpace) -> None:
    assert bank_formats(space) == ("int3-g32", "int4-g64", "mxfp4", "int4-g32", "int8-row")


def test_teachers_of_all_texts_count_up_together(
    inputs: Inputs, spec: SearchSpec, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    clock = StageClock(lambda *call: calls.append(call))
    spec = replaced(spec, cache=tmp_path / "cache")
    teachers = store_teachers(spec, inputs, clock)
    assert teachers.evaluation.tokens is inputs.evaluation
    assert teachers.heldout.tokens is inputs.heldout
    sets = (teachers.evaluation, teachers.heldout)
    assert [int(one.teacher.facts["n_windows"]) for one in sets] == [6, 6]
    assert [one.teacher.facts["k"] for one in sets] == [4096, 4096]
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {call[2] for call in calls} == {12}
    assert calls[-1] == ("teacher", 12, 12)
    names = {p.name for p in (tmp_path / "cache" / "teachers").iterdir()}
    store_teachers(spec, inputs, StageClock(no_progress))
    assert {p.name for p in (tmp_path / "cache" / "teachers").iterdir()} == names
    assert all("float32-cpu" in name for name in names)


def test_costs_of_the_menu_become_the_problem(
    inputs: Inputs, spec: SearchSpec, space: SearchSpace
) -> None:
    clock = StageClock(no_progress)
    bank = open_filled_bank(spec, inputs, bank_formats(space), clock)
    costs = measure_unit_costs(spec, inputs, space, bank, clock)
    problem = problem_of(space, costs)
    assert problem.formats == space.menu
    column = costs.table.formats.index("int4-g32")
    own = space.menu.index("int4-g32")
    np.testing.assert_array_equal(problem.costs["fisher"][:, own], costs.units.fisher[:, column])
    np.testing.assert_array_equal(problem.costs["error"][:, own], costs.units.error[:, column])
    unit = space.units[3]
    expected = [unit.storage_bits(f) for f in map(parse_format, space.menu)]
    assert problem.bits[3].tolist() == expected
    predicted = costs.predict_kl(space, uniform_assignment(space.inventory, "int4-g32"))
    assert predicted == pytest.approx(costs.units.fisher[:, column].sum())


@pytest.fixture
def prepared(inputs: Inputs, spec: SearchSpec, space: SearchSpace) -> Prepared:
    return prepare(spec, inputs, space, StageClock(no_progress))


def test_logs_lie_beside_the_bank_one_per_text(prepared: Prepared) -> None:
    part = Divergence(torch.ones(2), torch.ones(2), torch.ones(2), 48, 0.1)
    names = {p.name for p in prepared.bank.path.glob("evaluations/*")}
    digest = "test_logs_lie_beside_the_bank"
    prepared.log_of(prepared.teachers.evaluation).add(digest, part)
    assert prepared.log_of(prepared.teachers.evaluation).n_windows(digest) == 2
    assert prepared.log_of(prepared.teachers.heldout).n_windows(digest) == 0
    text = prepared.inputs.evaluation.digest[:16]
    found = {p.name for p in prepared.bank.path.glob("evaluations/*")}
    assert found - names <= {f"{text}-float32-cpu.jsonl"}
    assert f"{text}-float32-cpu.jsonl" in found


def test_problem_has_the_inputs_of_the_allocators_that_are_asked_for(
    inputs: Inputs, spec: SearchSpec, space: SearchSpace, prepared: Prepared
) -> None:
    optional = {"alpha-hill", "alphaq", "gemq"}
    assert set(available(prepared.problem)) == set(ALLOCATORS) - optional
    for asked, missing in (
        ({"allocators": "all"}, set()),
        ({"allocators": "gemq,alphaq"}, set()),
        ({"allocator": "gemq"}, {"alpha-hill", "alphaq"}),
        ({"allocator": "alpha-hill"}, {"gemq"}),
        ({"allocators": "pmq,evolution"}, optional),
    ):
        found = prepare(replaced(spec, **asked), inputs, space, StageClock(no_progress))
        assert set(available(found.problem)) == set(ALLOCATORS) - missing, asked


def test_a_short_bank_holds_anchors_and_what_can_win(
    inputs: Inputs, spec: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costing, "_SAMPLED_UNITS", 2)
    menu = "int2-g32,int3-g32,int4-g32,int5-g32-asym,int6-g32,int8-g32"
    short = replaced(spec, cache=tmp_path / "cache", bank="short", formats=menu, budget="4.6bits")
    profile = find_profile("any")
    names, budget = menu_of(menu, profile), parse_budget("4.6bits")
    space = make_space(inputs.source.map.inventory, profile, names, budget)
    prepared = prepare(short, inputs, space, StageClock(no_progress))
    whole = set(prepared.bank.formats())
    assert {"int2-g32", "int4-g64", "int6-g32"} <= whole < set(bank_formats(space))
    allowed = prepared.problem.allowed
    assert 0.4 < allowed.mean() < 1.0
    assert allowed[:, prepared.problem.formats.index("int2-g32")].all()
    for unit, row in zip(space.units, allowed, strict=True):
        for name, is_allowed in zip(prepared.problem.formats, row, strict=True):
            matrix = unit.matrices[0]
            assert (matrix.name in prepared.bank.matrices(name, matrix.layer)) == is_allowed
    again = prepare(short, inputs, space, StageClock(no_progress))
    assert np.array_equal(again.problem.allowed, allowed)
    assert len(list(prepared.bank.path.glob("costs/*"))) == 1  # too few windows for a sample

    monkeypatch.setattr(costing, "_LEAST_LISTING", 1)
    sampled = prepare(
        replaced(short, cache=tmp_path / "sampled"), inputs, space, StageClock(no_progress)
    )
    folders = {path.name for path in sampled.bank.path.glob("costs/*")}
    tokens = inputs.calibration.tokens
    assert folders == {gradients_key(t, CostSettings()) for t in (tokens, tokens[::4])}
    assert 0.4 < sampled.problem.allowed.mean() < 1.0


def test_a_short_bank_without_a_format_for_all_is_refused(
    spec: SearchSpec, space: SearchSpace
) -> None:
    none = replace(space, menu=())
    costing.check_bank(replaced(spec, bank="short"), space)
    costing.check_bank(replaced(spec, bank="auto"), none)
    with pytest.raises(ConfigError, match="--bank full, or add one"):
        costing.check_bank(replaced(spec, bank="short"), none)

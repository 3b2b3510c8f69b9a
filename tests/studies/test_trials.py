"""Planned trials and proposals: in order, feasible, one format per unit."""

from collections.abc import Iterator

import numpy as np
import optuna
import pytest

from alphaquant.search.problem import Problem, make_problem
from alphaquant.search.sampler import next_trial
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.studies.trials import TrialRules, uniform_bits, uniform_fits

MENU = ("int2-g32", "int3-g32-asym", "int4-g64", "mxfp4", "int8-row")


def matrices() -> Iterator[Matrix]:
    """Two layers: odd widths, three experts."""
    for layer in range(2):
        name = f"model.layers.{layer}"
        yield Matrix(f"{name}.self_attn.o_proj", 40, 72, "attention", layer)
        for e in range(3):
            for part, shape in (("gate_proj", (24, 40)), ("up_proj", (24, 40))):
                yield Matrix(f"{name}.mlp.experts.{e}.{part}", *shape, "expert", layer, e)
            yield Matrix(f"{name}.mlp.experts.{e}.down_proj", 40, 24, "expert", layer, e)


INVENTORY = Inventory("tiny", tuple(matrices()))


def rules_of(budget: str, menu: tuple[str, ...] = MENU, profile: str = "any") -> TrialRules:
    space = make_space(INVENTORY, find_profile(profile), menu, parse_budget(budget))
    return TrialRules(space, problem_of(space), seed=0)


def problem_of(space: SearchSpace) -> Problem:
    formats = [parse_format(n) for n in space.menu]
    bits = np.array([[u.storage_bits(f) for f in formats] for u in space.units])
    cost = np.random.default_rng(0).uniform(0.5, 1.0, bits.shape) * 4.0 ** -(bits / 1000)
    return make_problem(
        space.units,
        space.menu,
        bits,
        np.array([[n in space.allowed(u) for n in space.menu] for u in space.units]),
        {"fisher": cost, "error": cost**1.1},
        np.linspace(0, 90, len(space.units)),
        INVENTORY.n_layers,
    )


def test_plan_is_uniform_knobs_allocators_then_smaller_budgets() -> None:
    rules = rules_of("4.5bits")
    plan = rules.planned()
    assert [p.attrs.get("format") for p in plan[:4]] == [
        *("int2-g32", "int3-g32-asym", "int4-g64", "mxfp4")
    ]
    assert plan[4].params["bits"] == rules.bits_high
    assert [p.attrs["allocator"] for p in plan[5:8]] == ["fisher", "error", "utilization"]
    levels = [p.params["bits"] for p in plan[8:]]
    assert len(levels) == 6
    assert levels == sorted(levels, reverse=True)
    assert rules.bits_low < levels[-1] < levels[0] < rules.bits_high


def test_uniform_formats_are_those_of_the_menu_that_fit() -> None:
    rules = rules_of("3.9bits", ("int2-g32", "int3-g32-asym", "int8-row"))
    names = [p.attrs["format"] for p in rules.planned() if p.attrs["plan"] == "uniform"]
    assert names == ["int2-g32", "int3-g32-asym"]
    assert uniform_bits(rules.space, "int3-g32-asym") <= 3.9 < uniform_bits(rules.space, "mxfp4")


def test_uniform_format_that_a_unit_cannot_load_does_not_fit() -> None:
    space = make_space(
        INVENTORY, find_profile("transformers"), ("mxfp4", "int8-row"), parse_budget("9bits")
    )
    # 40 inputs are no whole number of mxfp4's blocks of 32.
    assert not uniform_fits(space, "mxfp4")
    assert uniform_fits(space, "int8-row")


def test_high_end_is_the_dearest_assignment_where_the_budget_is_above_it() -> None:
    rules = rules_of("16bits")
    dearest = sum(max(u.storage_bits(parse_format(n)) for n in MENU) for u in rules.space.units)
    assert rules.bits_high == dearest / INVENTORY.n_weights


def test_three_of_four_sampled_trials_use_the_full_budget() -> None:
    rules = rules_of("4bits")
    pins = [dict(rules.pin(n)) for n in range(20, 28)]
    assert [bool(pin) for pin in pins] == [False, True, True, True] * 2
    assert pins[1] == {"bits": rules.bits_high}


@pytest.mark.parametrize("budget", ["4bits", "4.7bits", "13bits", "30KB", "20bits"])
@pytest.mark.parametrize("profile", ["any", "transformers"])
def test_every_proposal_is_feasible(budget: str, profile: str) -> None:
    rules = rules_of(budget, ("int2-g8", "int4-g8", "int8-row", "bf16"), profile)
    study = optuna.create_study(directions=["minimize", "minimize"])
    planned = rules.planned()
    for n in range(len(planned) + 8):
        trial = next_trial(study, planned, "random", 0, rules.pin(n))
        proposal = rules.propose(trial)
        assert rules.space.is_feasible(proposal.assignment), proposal.origin
        study.tell(trial, [float(n), float(-n)])


@pytest.mark.parametrize("name", [*MENU, "bf16"])
def test_menu_of_one_format_at_exactly_its_size_can_only_propose_it(name: str) -> None:
    n_bytes = INVENTORY.storage_bits(parse_format(name)) // 8
    rules = rules_of(f"{n_bytes}bytes", (name,))
    assert rules.bits_low == rules.bits_high
    assert rules.problem.limit_bits(rules.bits_low) == INVENTORY.storage_bits(parse_format(name))
    study = optuna.create_study(directions=["minimize", "minimize"])
    for n in range(len(rules.planned()) + 2):
        trial = next_trial(study, rules.planned(), "random", 0, rules.pin(n))
        assert set(rules.propose(trial).assignment.formats.values()) == {name}
        study.tell(trial, [0.0, 0.0])

"""Proposals: feasible, one format per unit, and only what keeps the side constraints."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest

from alphaquant.errors import AlphaQuantError, BudgetError, ConfigError
from alphaquant.search.allocators import available
from alphaquant.search.groups import make_groups
from alphaquant.search.sampler import PlannedTrial, next_trial
from alphaquant.search.side.constraints import SideConstraints
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.limits import LimitSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.trials import (
    Proposer,
    check_allocators,
    check_constrained,
    constraints_of,
    is_uniform_loadable,
    uniform_fits,
)
from alphaquant.testing.feasibility import is_feasible

MENU = ("int2-g32", "int3-g32-asym", "int4-g64", "mxfp4", "int8-row")
MakeProposer = Callable[..., Proposer]


def asked(**settings: Any) -> SearchSpec:
    return SearchSpec.of(budget="4bits", **settings)


def sampled(proposer: Proposer, n_trials: int) -> list[tuple[str, bool]]:
    """Origin and feasibility of sampled knobs and groups, full size and any."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    groups = make_groups(proposer.problem, "layer")
    found = []
    for n in range(n_trials):
        fixed = PlannedTrial({"bits": proposer.bits_high} if n % 2 else {})
        trial = next_trial(study, fixed, "random", 0)
        for proposal in (proposer.knobs(trial), proposer.groups(trial, groups)):
            is_sound = is_feasible(proposer.space, proposal.assignment)
            found.append((proposal.origin, is_sound and proposal.can_prune))
        study.tell(trial, [float(n), float(-n)])
    return found


def test_uniform_formats_are_those_of_the_menu_that_fit(make_proposer: MakeProposer) -> None:
    space = make_proposer("3.9bits", ("int2-g32", "int3-g32-asym", "int8-row")).space
    assert [n for n in space.menu if uniform_fits(space, n)] == ["int2-g32", "int3-g32-asym"]


def test_uniform_format_that_a_unit_cannot_load_does_not_fit(make_proposer: MakeProposer) -> None:
    space = make_proposer("9bits", ("mxfp4", "int8-row"), "transformers").space
    # 40 inputs are no whole number of mxfp4's blocks of 32.
    assert not uniform_fits(space, "mxfp4")
    assert not is_uniform_loadable(space, "mxfp4")
    assert uniform_fits(space, "int8-row")


def test_high_end_is_the_dearest_assignment_where_the_budget_is_above_it(
    make_proposer: MakeProposer,
) -> None:
    proposer = make_proposer("16bits")
    inventory, units = proposer.space.inventory, proposer.space.units
    dearest = sum(max(u.storage_bits(parse_format(n)) for n in MENU) for u in units)
    assert proposer.bits_high == proposer.bits_most == dearest / inventory.n_weights
    smaller = make_proposer("4bits")
    assert smaller.bits_high < smaller.bits_most == proposer.bits_most


@pytest.mark.parametrize("budget", ["4bits", "4.7bits", "13bits", "30KB", "20bits"])
@pytest.mark.parametrize("profile", ["any", "transformers"])
def test_every_proposal_is_feasible(
    budget: str, profile: str, make_proposer: MakeProposer
) -> None:
    proposer = make_proposer(budget, ("int2-g8", "int4-g8", "int8-row", "bf16"), profile)
    assert sampled(proposer, 8) == [("knobs", True), ("groups", True)] * 8
    names = [name for name in available(proposer.problem) if name != "uniform"]
    assert len(names) > 3
    for name in names:
        proposal = proposer.allocator(name)
        assert proposal is not None
        assert proposal.origin == f"allocator:{name}"
        assert not proposal.can_prune
        assert is_feasible(proposer.space, proposal.assignment)


@pytest.mark.parametrize("name", [*MENU, "bf16"])
def test_menu_of_one_format_at_exactly_its_size_can_only_propose_it(
    name: str, make_proposer: MakeProposer
) -> None:
    space = make_proposer("20bits", (name,)).space
    n_bits = space.inventory.storage_bits(parse_format(name))
    proposer = make_proposer(f"{n_bits // 8}bytes", (name,))
    assert proposer.bits_low == proposer.bits_high
    assert proposer.problem.limit_bits(proposer.bits_low) == n_bits
    assert sampled(proposer, 3) == [("knobs", True), ("groups", True)] * 3


def test_choice_is_the_inverse_of_spread(make_proposer: MakeProposer) -> None:
    proposer = make_proposer("9bits")
    choice = np.arange(len(proposer.problem.units)) % len(MENU)
    found = proposer.choice(proposer.spread(choice))
    assert found is not None
    np.testing.assert_array_equal(found, choice)
    outside = uniform_assignment(proposer.space.inventory, "bf16")
    assert proposer.choice(outside) is None


def test_optimum_within_a_limit_may_be_above_the_budget(make_proposer: MakeProposer) -> None:
    proposer = make_proposer("3bits")
    limit = proposer.problem.limit_bits(6.0)
    proposal = proposer.at(proposer.base_cost, limit, "size")
    n_bits = proposal.assignment.storage_bits(proposer.space.inventory)
    assert proposer.limit_bits < n_bits <= limit
    assert (proposal.origin, proposal.can_prune) == ("size", False)
    assert proposal.gap is not None


def test_uniform_and_allocators_that_break_a_side_constraint_are_left_out(
    make_proposer: MakeProposer,
) -> None:
    proposer = make_proposer("4.6bits", layer_minimum_bits=3.9)
    assert proposer.uniform("int2-g32") is None
    assert not proposer.keeps_uniform("int2-g32")
    assert proposer.keeps_uniform("bf16")  # not in the menu
    assert proposer.uniform("int4-g64") is not None
    one = make_proposer("4bits", max_formats_per_layer=1)
    assert one.uniform("int2-g32") is not None
    assert one.allocator("fisher") is None
    assert make_proposer("4bits").allocator("fisher") is not None


def test_limit_that_side_constraints_cannot_meet_is_an_error(make_proposer: MakeProposer) -> None:
    proposer = make_proposer("4.6bits", layer_minimum_bits=4.0)
    with pytest.raises(BudgetError, match="layer_minimum_bits"):
        proposer.at(proposer.base_cost, proposer.problem.limit_bits(3.0), "size")


def test_unknown_allocator_is_refused_by_name() -> None:
    for name in (None, "fisher", "evolution"):
        check_allocators(asked(allocator=name))
    for names in ("", "all", "pmq", "gemq, evolution"):
        check_allocators(asked(allocators=names))
    for changes in ({"allocator": "fishy"}, {"allocators": "pmq,fishy"}):
        with pytest.raises(ConfigError, match="unknown allocator 'fishy'; use one of .*evolution"):
            check_allocators(asked(**changes))
    with pytest.raises(ConfigError, match="--allocator pmq runs alone .*give one of the two"):
        check_allocators(asked(allocator="pmq", allocators="gemq"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "groups"}, "mode groups keeps the budget but not max_formats_per_layer = 2"),
        ({"allocator": "evolution"}, "allocator evolution .*use another allocator"),
        ({"allocators": "pmq,evolution"}, "allocator evolution .*use another allocator"),
        ({"active_budget": "4bits"}, "active budget '4bits'; write bytes"),
    ],
)
def test_side_constraints_that_nothing_would_keep_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    spec = asked(**{"max_formats_per_layer": 2, **changes})
    with pytest.raises(AlphaQuantError, match=words):
        check_constrained(spec)


@pytest.mark.parametrize(
    "spec",
    [
        asked(mode="groups"),
        asked(allocator="evolution"),
        asked(max_formats_per_layer=2),
        asked(mode="knobs", layer_minimum_bits=3.0, active_budget="1MiB"),
        asked(mode="groups", allocator="fisher", layer_minimum_bits=3.0),
    ],
)
def test_side_constraints_that_are_kept_are_taken(spec: SearchSpec) -> None:
    check_constrained(spec)


def test_side_constraints_are_those_asked_for_with_the_active_budget_in_bits() -> None:
    def made(**limits: Any) -> SideConstraints:
        return constraints_of(LimitSpec(budget="4bits", **limits))

    assert made() == SideConstraints()
    some = made(max_formats_per_layer=2, layer_minimum_bits=3.5, active_budget="1KiB")
    assert some == SideConstraints(2, 3.5, 8192)
    assert made(active_budget="1KB") == SideConstraints(active_bits=8000)
    with pytest.raises(BudgetError, match="active budget '4.25bits'; write bytes, such as 600MiB"):
        made(active_budget="4.25bits")

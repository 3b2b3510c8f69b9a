"""The search space: what it checks when it is built, and what is feasible in it."""

import pytest

from alphaquant.errors import BudgetError, FormatError
from alphaquant.spaces.assignment import (
    Assignment,
    assignment_from_units,
    uniform_assignment,
)
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.menus import DEFAULT_MENU
from alphaquant.spaces.profiles import PROFILES, units_of
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory
from alphaquant.testing.feasibility import is_feasible


def space_of(model: Inventory, profile: str, budget: str, *menu: str) -> SearchSpace:
    return make_space(model, PROFILES[profile], menu, parse_budget(budget))


def test_a_space_holds_the_profile_s_units_and_menu(olmoe: Inventory) -> None:
    space = space_of(olmoe, "vllm", "4.25bits", "int1-g64", "int4-g128", "bf16")
    assert space.profile_name == "vllm"
    assert space.menu == ("int4-g128", "bf16")
    assert space.units == units_of(olmoe, PROFILES["vllm"])
    assert space.limit_bits == 4.25 * olmoe.n_weights
    assert all(space.allowed(unit) == space.menu for unit in space.units)


def test_the_default_menu_reaches_4_25_bits(inventory: Inventory) -> None:
    space = space_of(inventory, "any", "4.25", *DEFAULT_MENU)
    assert is_feasible(space, uniform_assignment(inventory, "mxfp4"))
    assert not is_feasible(space, uniform_assignment(inventory, "int4-g32"))


def test_a_budget_below_the_smallest_formats_is_refused(olmoe: Inventory) -> None:
    with pytest.raises(BudgetError, match="reach from 4.125 bits per weight .* to 8.125 bits"):
        space_of(olmoe, "any", "4bits", "int4-g128", "int8-g128")
    space_of(olmoe, "any", "4.125bits", "int4-g128", "int8-g128")


def test_the_range_counts_only_what_each_unit_may_have(olmoe: Inventory) -> None:
    # experts of transformers cannot be bf16: 96 % of the weights at 4.125 and 4 % at 16 are 4.6
    with pytest.raises(BudgetError, match=r"reach from 4\.125 .* to 4\.6 bits per weight"):
        space_of(olmoe, "transformers", "4bits", "int4-g128", "bf16")


def test_a_menu_that_leaves_a_unit_without_a_format_is_refused(deepseek: Inventory) -> None:
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.down_proj \(dense, 256 x 10944\)"):
        space_of(deepseek, "sglang", "16bits", "int4-g128")
    with pytest.raises(FormatError, match="profile vllm .* loads"):
        space_of(deepseek, "vllm", "16bits", "mxfp6")
    assert space_of(deepseek, "any", "16bits", "int4-g128").menu == ("int4-g128",)


def test_feasible_is_within_the_budget_to_the_byte(qwen2_moe: Inventory) -> None:
    n_bytes = uniform_assignment(qwen2_moe, "mxfp4").count_bits(qwen2_moe).checkpoint_bytes
    exact = space_of(qwen2_moe, "any", f"{n_bytes}bytes", "int3-g128", "mxfp4")
    below = space_of(qwen2_moe, "any", f"{n_bytes - 1}bytes", "int3-g128", "mxfp4")
    assert is_feasible(exact, uniform_assignment(qwen2_moe, "mxfp4"))
    assert not is_feasible(below, uniform_assignment(qwen2_moe, "mxfp4"))


def test_feasible_is_what_the_engine_loads(olmoe: Inventory) -> None:
    space = space_of(olmoe, "vllm", "16bits", "int4-g128", "int8-g128")
    choice = {u.name: space.menu[i % 2] for i, u in enumerate(space.units)}
    assignment = assignment_from_units(olmoe, space.units, choice)
    assert is_feasible(space, assignment)
    down = "model.layers.3.mlp.experts.5.down_proj"
    other = {"int4-g128": "int8-g128", "int8-g128": "int4-g128"}[assignment.formats[down]]
    split = Assignment({**assignment.formats, down: other})
    assert not is_feasible(space, split)
    assert not is_feasible(space, uniform_assignment(olmoe, "int1-g128"))


def test_a_baseline_outside_the_menu_can_be_feasible(olmoe: Inventory) -> None:
    space = space_of(olmoe, "any", "4.25bits", "int3-g128", "int4-g128")
    assert is_feasible(space, uniform_assignment(olmoe, "mxfp4"))


def test_units_take_only_formats_in_which_all_their_matrices_exist(olmoe: Inventory) -> None:
    menu, odd = ("int4-g128", "int8-g128", "bf16"), olmoe.matrices[0].name
    held = {m.name: dict.fromkeys(menu, "here") for m in olmoe.matrices}
    held[odd] = {"bf16": ""}
    space = make_space(olmoe, PROFILES["any"], menu, parse_budget("5bits"), held)
    allowed = {unit.name: space.allowed(unit) for unit in space.units}
    assert allowed.pop(odd) == ("bf16",)
    assert set(allowed.values()) == {menu}
    coupled = make_space(olmoe, PROFILES["vllm"], menu, parse_budget("6bits"), held)
    first = next(unit for unit in coupled.units if odd in {m.name for m in unit.matrices})
    assert len(first.matrices) > 1
    assert coupled.allowed(first) == ("bf16",)


def test_a_unit_that_exists_in_no_format_is_refused(olmoe: Inventory) -> None:
    held = {m.name: {"int4-g128": "here"} for m in olmoe.matrices}
    held[olmoe.matrices[0].name] = {"int2-g128": "here"}
    with pytest.raises(FormatError, match="the candidates have .* in no format that profile any"):
        make_space(olmoe, PROFILES["any"], ("int4-g128",), parse_budget("5bits"), held)

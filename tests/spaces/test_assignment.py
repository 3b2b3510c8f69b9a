"""Assignments: totals, the numbers of a report, and spreading units over matrices."""

import json
from hashlib import sha256

import pytest

from alphaquant.errors import ConfigError, FormatError
from alphaquant.spaces.assignment import (
    Assignment,
    assignment_from_units,
    uniform_assignment,
)
from alphaquant.spaces.profiles import PROFILES, units_of
from alphaquant.spaces.units import Inventory, Kept, Matrix, Unit

EXPERT = Matrix("m.experts.0.down_proj", 16, 128, "expert", 0, 0)
ATTENTION = Matrix("m.q_proj", 8, 128, "attention", 0)
TOY = Inventory("toy", (EXPERT, ATTENTION), (Kept("norm.weight", 100, 200),))


def test_the_digest_is_that_of_the_sorted_json_and_not_of_the_order() -> None:
    forward = Assignment({"a": "bf16", "b": "mxfp4"})
    backward = Assignment({"b": "mxfp4", "a": "bf16"})
    text = json.dumps({"a": "bf16", "b": "mxfp4"}, sort_keys=True)
    assert forward.digest == backward.digest == sha256(text.encode()).hexdigest()
    assert forward.digest != Assignment({"a": "bf16", "b": "mxfp6"}).digest


def test_the_counts_of_a_report_are_those_by_hand() -> None:
    count = Assignment({EXPERT.name: "int4-g128", ATTENTION.name: "int8-g64"}).count_bits(TOY)
    expert_bits = 16 * 128 * 4 + 16 * 16  # 8448
    attention_bits = 8 * 128 * 8 + 8 * 2 * 16  # 8448
    assert count.routed_bits_per_weight == expert_bits / 2048 == 4.125
    assert count.bits_per_weight == (expert_bits + attention_bits) / 3072
    assert count.checkpoint_bits_per_weight == (expert_bits + attention_bits + 1600) / 3172
    assert count.quantized_bytes == 2112
    assert count.checkpoint_bytes == 2312


def test_a_model_without_routed_experts_has_no_routed_bits(llama: Inventory) -> None:
    count = uniform_assignment(llama, "mxfp4").count_bits(llama)
    assert count.routed_bits_per_weight is None
    assert count.bits_per_weight == 4.25


@pytest.mark.parametrize("name", ["mxfp4", "int4-g64"])
def test_4_25_bits_is_exactly_these_uniform_formats(qwen2_moe: Inventory, name: str) -> None:
    assignment = uniform_assignment(qwen2_moe, name)
    assert assignment.storage_bits(qwen2_moe) == 4.25 * qwen2_moe.n_weights
    assert set(assignment.formats.values()) == {name}


def test_a_uniform_assignment_has_canonical_names(llama: Inventory) -> None:
    assert set(uniform_assignment(llama, "int4").formats.values()) == {"int4-g128"}
    with pytest.raises(FormatError, match="unknown format 'int9'"):
        uniform_assignment(llama, "int9")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_choice_per_unit_reaches_every_matrix(inventory: Inventory, profile: str) -> None:
    units = units_of(inventory, PROFILES[profile])
    choice = {u.name: ("int4", "mxfp4")[i % 2] for i, u in enumerate(units)}
    assignment = assignment_from_units(inventory, units, choice)
    assert list(assignment.formats) == [m.name for m in inventory.matrices]
    for unit in units:
        names = {assignment.formats[m.name] for m in unit.matrices}
        assert names == {{"int4": "int4-g128"}.get(choice[unit.name], "mxfp4")}


def test_a_matrix_without_a_format_is_named() -> None:
    units = (Unit(EXPERT.name, (EXPERT,)), Unit(ATTENTION.name, (ATTENTION,)))
    with pytest.raises(ConfigError, match=r"1 matrices have no format, e\.g\. m\.q_proj; give"):
        assignment_from_units(TOY, units, {EXPERT.name: "bf16"})

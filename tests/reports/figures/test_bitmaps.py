"""Bits by layer and role, bits and tokens by layer and expert."""

import math

import numpy as np

from alphaquant.reports.figures.bitmaps import bits_by_expert, bits_by_role, tokens_by_expert
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.units import Inventory, Matrix


def matrix(name: str, kind: str, layer: int, expert: int | None = None, rows: int = 64) -> Matrix:
    return Matrix(f"model.layers.{layer}.{name}", rows, 64, kind, layer, expert)


def mixed() -> tuple[Inventory, Assignment]:
    """A dense layer 0, a layer 1 with experts 0 and 2; formats whose bits are easy to add."""
    formats = {
        matrix("mlp.down_proj", "dense", 0): "int4-g64",
        matrix("self_attn.q_proj", "attention", 1): "int8-g64",
        matrix("mlp.experts.0.gate_proj", "expert", 1, 0): "int2-g64",
        matrix("mlp.experts.0.down_proj", "expert", 1, 0): "int4-g64",
        matrix("mlp.experts.2.w2", "expert", 1, 2): "int8-g64",
        matrix("mlp.shared.up_proj", "shared", 1): "int4-g64",
    }
    inventory = Inventory("mixed", tuple(formats))
    return inventory, Assignment({m.name: name for m, name in formats.items()})


def test_bits_by_role_are_the_worked_example_and_nan_where_a_layer_has_no_such_matrix() -> None:
    inventory, assignment = mixed()
    found = bits_by_role(assignment, inventory)
    assert found.layers == ("0", "1")
    assert found.columns == (
        *("attention q", "routed gate", "routed down", "shared up", "dense down"),
    )
    nan = math.nan
    expected = [[nan, nan, nan, nan, 4.25], [8.25, 2.25, 6.25, 4.25, nan]]
    np.testing.assert_array_equal(found.values, expected)


def test_means_weigh_by_the_number_of_weights() -> None:
    small = matrix("mlp.experts.0.up_proj", "expert", 0, 0)
    large = matrix("mlp.experts.0.gate_proj", "expert", 0, 0, rows=192)
    inventory = Inventory("two", (small, large))
    assignment = Assignment({small.name: "int8-g64", large.name: "int4-g64"})
    found = bits_by_expert(assignment, inventory)
    assert found is not None
    assert found.values.tolist() == [[5.25]]


def test_the_roles_of_a_layer_add_up_to_the_assignments_bits() -> None:
    inventory, assignment = mixed()
    found = bits_by_role(assignment, inventory)
    weights = np.array([[0, 0, 0, 0, 1], [1, 1, 2, 1, 0]]) * 64 * 64
    assert np.nansum(found.values * weights) == assignment.storage_bits(inventory)


def test_bits_by_expert_have_only_layers_and_experts_that_are_routed() -> None:
    inventory, assignment = mixed()
    found = bits_by_expert(assignment, inventory)
    assert found is not None
    assert (found.layers, found.columns) == (("1",), ("0", "2"))
    assert found.values.tolist() == [[3.25, 8.25]]


def test_a_model_without_routed_experts_has_no_map_of_experts() -> None:
    inventory = Inventory("dense", (matrix("mlp.up_proj", "dense", 0),))
    assert bits_by_expert(uniform_assignment(inventory, "int4-g64"), inventory) is None
    assert tokens_by_expert({}) is None
    assert tokens_by_expert({"model.layers.0.mlp": []}) is None


def test_tokens_of_layers_are_in_the_order_of_layers_and_modules_of_one_add_up() -> None:
    found = tokens_by_expert(
        {
            "model.layers.10.mlp.experts": [1, 2, 3],
            "model.layers.9.mlp.experts": [7, 0],
            "model.layers.9.mlp.more": [1, 1],
        }
    )
    assert found is not None
    assert (found.layers, found.columns) == (("9", "10"), ("0", "1", "2"))
    np.testing.assert_array_equal(found.values, [[8, 1, math.nan], [1, 2, 3]])

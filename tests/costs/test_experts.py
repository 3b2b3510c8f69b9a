"""Sensitivity of experts: the views by hand, exact totals, and measured costs of a tiny model."""

from collections.abc import Sequence
from functools import reduce
from math import fsum
from operator import add
from pathlib import Path

import numpy as np
import pytest

from alphaquant.costs.experts import (
    VIEWS,
    expert_sensitivity,
    expert_units,
    measured_formats,
)
from alphaquant.costs.fisher import CostSettings, CostTable
from alphaquant.errors import AlphaQuantError, ConfigError, FormatError, ModelError
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.testing.cost_cases import COST_FORMATS, make_cost_case

FORMATS = ("int2-g64", "int8-g64")
PARTS = ("gate_proj", "up_proj", "down_proj")


def make_inventory(n_layers: int = 1, n_experts: int = 2) -> Inventory:
    """A dense matrix and some experts per layer."""
    matrices = []
    for layer in range(n_layers):
        name = f"model.layers.{layer}"
        matrices.append(Matrix(f"{name}.self_attn.o_proj", 64, 64, "attention", layer))
        for e in range(n_experts):
            matrices += [
                Matrix(f"{name}.mlp.experts.{e}.{part}", 64, 64, "expert", layer, e)
                for part in PARTS
            ]
    return Inventory("tiny", tuple(matrices))


def make_table(
    inventory: Inventory, costs: Sequence[Sequence[float]], n_tokens: Sequence[int]
) -> CostTable:
    """Costs of which the whole expert's are given: the products of its matrices are equal.

    Args:
        inventory: from `make_inventory`.
        costs: of each expert in both formats, nats per token.
        n_tokens: of each expert.
    """
    units = expert_units(inventory)
    given = {
        m.name: (cost, n)
        for unit, cost, n in zip(units, costs, n_tokens, strict=True)
        for m in unit.matrices
    }
    rows = [given.get(m.name, ((1.0, 1.0), 400)) for m in inventory.matrices]
    cost = np.array([c for c, _ in rows])
    tokens = np.array([n for _, n in rows], dtype=np.float64)
    return CostTable(
        matrices=tuple(m.name for m in inventory.matrices),
        formats=FORMATS,
        # One sequence of one token: 1/2 (3 * sqrt(2 c) / 3)^2 = c.
        products=(np.sqrt(2 * cost) / 3)[..., None].astype(np.float32),
        token_fisher=cost / 6,
        error=cost / 3,
        gemq=cost,
        weight_error=cost,
        n_tokens=tokens,
        routing_weight=tokens / 800,
        active_share=tokens / 400,
        seq_len=1,
        settings=CostSettings(),
    )


def test_the_worked_example_of_two_experts() -> None:
    inventory = make_inventory()
    table = make_table(inventory, [(0.006, 0.0), (0.004, 0.0)], [300, 100])
    found = expert_sensitivity(table, inventory, "int2-g64", "int8-g64")
    first, second = found.experts
    assert [e.name for e in found.experts] == [f"model.layers.0.mlp.experts.{e}" for e in range(2)]
    # Products are float32, so squares have a relative error of 2**-23 at most.
    close = {"rel": 2**-22}
    assert (first.fisher, second.fisher) == (
        pytest.approx(0.006, **close),
        pytest.approx(0.004, **close),
    )
    assert (first.saved_bits, second.saved_bits) == (6 * 3 * 64 * 64,) * 2
    assert first.cost_per_bit == pytest.approx(0.001, **close)
    assert second.cost_per_bit == pytest.approx(0.004 / 6, **close)
    assert (first.use, second.use) == (0.75, 0.25)
    assert first.fragility == pytest.approx(0.001 / 0.75, **close)
    assert second.fragility == pytest.approx(0.004 / 6 / 0.25, **close)
    assert first.use_weighted == pytest.approx(0.00075, **close)
    assert (first.n_tokens, first.active_share, first.routing_weight) == (300, 0.75, 0.375)
    # Three matrices: a sixth of the cost each is half, a third each is all of it.
    assert first.token_fisher == pytest.approx(0.003)
    assert first.error == pytest.approx(0.006)


def test_matrices_of_an_expert_are_added_before_they_are_squared() -> None:
    inventory = make_inventory(n_experts=1)
    table = make_table(inventory, [(1.0, 0.0)], [4])
    table.products[1:, 0, 0] = (1.0, 2.0, -3.0)
    assert expert_sensitivity(table, inventory, "int2-g64").experts[0].fisher == 0.0
    table.products[1:, 0, 0] = (1.0, 2.0, 3.0)
    assert expert_sensitivity(table, inventory, "int2-g64").experts[0].fisher == 18.0


def test_cost_and_bits_of_the_reference_are_subtracted() -> None:
    inventory = make_inventory(n_experts=1)
    table = make_table(inventory, [(0.5, 0.125)], [4])
    (against,) = expert_sensitivity(table, inventory, "int2-g64", "int8-g64").experts
    (original,) = expert_sensitivity(table, inventory, "int2-g64", "bf16").experts
    assert against.added_fisher == pytest.approx(0.375, rel=2**-22)
    assert against.cost_per_bit == against.added_fisher / 6
    assert original.added_fisher == original.fisher == against.fisher
    assert original.cost_per_bit == pytest.approx(0.5 / (16 - 2.25), rel=2**-22)


def test_an_unseen_expert_costs_nothing_and_has_no_fragility() -> None:
    inventory = make_inventory()
    table = make_table(inventory, [(0.0, 0.0), (0.5, 0.0)], [0, 8])
    seen, unseen = expert_sensitivity(table, inventory, "int2-g64").experts
    assert (seen.expert, seen.use) == (1, 1.0)
    assert (unseen.use, unseen.cost_per_bit, unseen.fragility) == (0.0, 0.0, None)


def test_a_layer_without_tokens_has_no_use() -> None:
    inventory = make_inventory()
    table = make_table(inventory, [(0.0, 0.0), (0.0, 0.0)], [0, 0])
    found = expert_sensitivity(table, inventory, "int2-g64")
    assert [e.use for e in found.experts] == [0.0, 0.0]
    assert [e.expert for e in found.experts] == [0, 1]


def test_costs_of_experts_sum_to_the_totals_exactly_in_any_order() -> None:
    inventory = make_inventory(n_layers=3, n_experts=7)
    rng = np.random.default_rng(0)
    costs = [(float(c), 0.0) for c in 10.0 ** rng.uniform(-4, 0, 21)]
    table = make_table(inventory, costs, list(range(21)))
    found = expert_sensitivity(table, inventory, "int2-g64")
    one_by_one = {
        reduce(add, (e.fisher for e in (found.experts[i] for i in rng.permutation(21))))
        for _ in range(9)
    }
    assert len(one_by_one) > 1  # so the order matters where every addition rounds
    shuffled = [found.experts[i] for i in rng.permutation(21)]
    for name in ("fisher", "token_fisher", "added_fisher"):
        assert fsum(getattr(e, name) for e in shuffled) == getattr(found.total, name)
        for layer in found.layers:
            own = [getattr(e, name) for e in shuffled if e.layer == layer.layer]
            assert fsum(own) == getattr(layer, name)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    assert found.total.layer is None
    for name in ("n_experts", "n_tokens", "saved_bits"):
        assert sum(getattr(t, name) for t in found.layers) == getattr(found.total, name)
    assert found.total.n_tokens == sum(range(21))
    assert found.total.n_experts == 21


def test_experts_are_ordered_by_cost_per_bit() -> None:
    inventory = make_inventory(n_layers=2, n_experts=4)
    costs = [(c, 0.0) for c in (0.1, 0.4, 0.2, 0.2, 0.3, 0.0, 0.0, 0.5)]
    found = expert_sensitivity(make_table(inventory, costs, [1] * 8), inventory, "int2-g64")
    ranked = [(e.layer, e.expert) for e in found.experts]
    assert ranked == [(1, 3), (0, 1), (1, 0), (0, 2), (0, 3), (0, 0), (1, 1), (1, 2)]


def test_cost_per_bit_is_use_times_fragility_on_a_measured_model(tmp_path: Path) -> None:
    case = make_cost_case(tmp_path, "qwen2_moe")
    table = case.costs()
    low, high = COST_FORMATS
    found = expert_sensitivity(table, case.map.inventory, low, high)
    assert {e.name for e in found.experts} == {u.name for u in expert_units(case.map.inventory)}
    for e in found.experts:
        assert e.fragility is not None
        assert e.use * e.fragility == pytest.approx(e.cost_per_bit, rel=1e-14)
        assert e.use_weighted == e.use * e.cost_per_bit
    for layer in found.layers:
        own = [e for e in found.experts if e.layer == layer.layer]
        assert sum(e.use for e in own) == pytest.approx(1.0, rel=1e-14)
        assert sum(e.active_share for e in own) == pytest.approx(2.0, rel=1e-14)  # top 2
        assert layer.n_tokens == 2 * 60
    row = {name: i for i, name in enumerate(table.matrices)}
    expert = found.experts[0]
    rows = [row[f"{expert.name}.{part}"] for part in PARTS]
    products = table.products[rows, table.formats.index(low)].astype(np.float64).sum(0)
    assert expert.fisher == pytest.approx(0.5 * np.square(products).mean() / 10, rel=1e-12)


def test_every_view_is_an_attribute() -> None:
    inventory = make_inventory()
    table = make_table(inventory, [(0.5, 0.0), (0.5, 0.0)], [1, 1])
    expert = expert_sensitivity(table, inventory, "int2-g64").experts[0]
    assert all(isinstance(getattr(expert, view), float) for view in VIEWS)


def test_formats_to_measure_are_the_quantized_ones() -> None:
    assert measured_formats("int2-g64", "bf16") == ("int2-g64",)
    assert measured_formats("int4-g64", "int2-g64") == ("int2-g64", "int4-g64")
    assert measured_formats("int4", "int4-g128") == ("int4-g128",)


@pytest.mark.parametrize(
    ("format_name", "against", "error", "words"),
    [
        ("bf16", "bf16", ConfigError, "keeps the weights"),
        ("int9", "bf16", FormatError, "int9"),
        ("int2-g64", "int2", ConfigError, "int2-g128.*measured in int2-g64, int8-g64"),
        ("int2-g64", "int2-g64", ConfigError, "no fewer bits"),
        ("int8-g64", "int2-g64", ConfigError, "larger format"),
    ],
)
def test_formats_that_cannot_be_compared_are_refused(
    format_name: str, against: str, error: type[AlphaQuantError], words: str
) -> None:
    inventory = make_inventory()
    table = make_table(inventory, [(0.5, 0.0), (0.5, 0.0)], [1, 1])
    with pytest.raises(error, match=words):
        expert_sensitivity(table, inventory, format_name, against)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no routed experts"):
        expert_units(make_inventory(n_experts=0))

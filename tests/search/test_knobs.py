"""Knobs: each formula by hand, and the round trip through an Optuna trial."""

from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest

from alphaquant.errors import ConfigError
from alphaquant.search.arrays import FloatArray
from alphaquant.search.knobs import (
    KNOB_RANGES,
    Knobs,
    apply_knobs,
    knob_params,
    make_monotone,
    shrink_rare,
    suggest_knobs,
    unit_multipliers,
)
from alphaquant.search.problem import Problem, make_problem
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Matrix, Unit
from alphaquant.testing.allocators import changed, example_problem

PLAIN = Knobs(bits=4.0, error_weight=0.0, rare_shrinkage=0.0)


def _expert(layer: int, expert: int, projection: str) -> Unit:
    name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
    return Unit(name, (Matrix(name, 10, 10, "expert", layer, expert),))


def _problem(
    fisher: list[list[float]],
    error: list[list[float]] | None = None,
    formats: tuple[str, ...] = ("int3-g128-asym", "int4-g128-asym", "int5-g128-asym"),
    **changes: Any,
) -> Problem:
    """Down projections of one layer, 100 weights each."""
    units = changes.pop("units", [_expert(0, e, "down_proj") for e in range(len(fisher))])
    formats = formats[: len(fisher[0])]
    bits = [[u.storage_bits(parse_format(f)) for f in formats] for u in units]
    given: dict[str, Any] = {"allowed": np.ones((len(units), len(formats))), "n_layers": 1}
    given |= {"n_tokens": np.full(len(units), 100.0)} | changes
    costs = {"fisher": fisher, "error": error or fisher}
    return make_problem(units, formats, bits, costs=costs, **given)


def test_the_worked_example_of_rare_units() -> None:
    # The group's 99 + 1 of cost over (784 + 16) * 100 is 1/800 per token and weight.
    problem = _problem([[99.0], [1.0]], n_tokens=[784.0, 16.0])
    shrunk = shrink_rare(problem, problem.costs["fisher"], 64.0)
    assert shrunk[1, 0] == pytest.approx(1.8)
    assert shrink_rare(problem, problem.costs["fisher"], 0.0)[1, 0] == 1.0


def test_a_unit_without_tokens_counts_as_three_tokens_of_its_group() -> None:
    units = [_expert(0, 0, "down_proj"), _expert(0, 1, "down_proj"), _expert(1, 0, "down_proj")]
    problem = _problem(
        [[4.0], [0.0], [100.0]], units=units, n_layers=2, n_tokens=[100.0, 0.0, 100.0]
    )
    shrunk = shrink_rare(problem, problem.costs["fisher"], 1.0)[:, 0]
    assert shrunk == pytest.approx([4.0, 3 * 4.0 / 100, 100.0])


def test_a_rarely_used_unit_does_not_cost_as_much_as_a_busy_one() -> None:
    problem = _problem([[8.0], [0.004]], n_tokens=[4000.0, 2.0])
    shrunk = shrink_rare(problem, problem.costs["fisher"], 64.0)[:, 0]
    assert shrunk[1] < 0.01 * shrunk[0]


def test_the_mix_is_geometric_and_error_is_scaled_to_fisher() -> None:
    # One group: fisher sums to 10, error to 1000, so error counts 1/100.
    problem = _problem([[8.0], [2.0]], [[200.0], [800.0]])
    mixed = apply_knobs(problem, replace(PLAIN, error_weight=0.25))
    assert mixed[:, 0] == pytest.approx([8**0.75 * 2**0.25, 2**0.75 * 8**0.25])
    assert apply_knobs(problem, replace(PLAIN, error_weight=1.0))[:, 0] == pytest.approx([2, 8])
    assert apply_knobs(problem, PLAIN)[:, 0].tolist() == [8, 2]


def test_each_group_has_its_own_scale_and_one_without_signal_takes_the_overall_one() -> None:
    units = [_expert(layer, 0, "down_proj") for layer in range(3)]
    problem = _problem([[4.0], [6.0], [0.0]], [[1.0], [600.0], [399.0]], units=units, n_layers=3)
    scaled = apply_knobs(problem, replace(PLAIN, error_weight=1.0))
    assert scaled[:, 0] == pytest.approx([4, 6, 399 * 10 / 1000])


def test_no_error_at_all_costs_nothing_once_error_has_weight() -> None:
    problem = _problem([[1.0]], [[0.0]])
    assert apply_knobs(problem, Knobs(4.0))[0, 0] == 0


def _with_token_costs(problem: Problem, token_fisher: list[list[float]]) -> Problem:
    return changed(problem, costs={**problem.costs, "token_fisher": token_fisher})


def test_the_cost_per_token_is_scaled_to_fisher_per_group_and_mixed_in_logs() -> None:
    # One group: fisher sums to 10, the cost per token to 1000, so that counts 1/100.
    problem = _with_token_costs(_problem([[8.0], [2.0]]), [[200.0], [800.0]])
    mixed = apply_knobs(problem, replace(PLAIN, token_weight=0.25))
    assert mixed[:, 0] == pytest.approx([8**0.75 * 2**0.25, 2**0.75 * 8**0.25])
    assert apply_knobs(problem, replace(PLAIN, token_weight=1.0))[:, 0] == pytest.approx([2, 8])
    assert apply_knobs(problem, replace(PLAIN, token_weight=0.0))[:, 0].tolist() == [8, 2]
    units = [_expert(layer, 0, "down_proj") for layer in range(2)]
    apart = _with_token_costs(_problem([[8.0], [2.0]], units=units, n_layers=2), [[1.0], [9.0]])
    alone = apply_knobs(apart, replace(PLAIN, token_weight=1.0))
    assert alone[:, 0] == pytest.approx([8, 2])


def test_the_error_is_scaled_to_the_mix_of_both_fisher_costs() -> None:
    problem = _problem([[8.0], [2.0]], [[100.0], [300.0]])
    problem = _with_token_costs(problem, [[2.0], [8.0]])
    # Halves of both are 4 and 4, in sum 8; the error's shares are 1/4 and 3/4.
    cost = apply_knobs(problem, replace(PLAIN, token_weight=0.5, error_weight=1.0))
    assert cost[:, 0] == pytest.approx([2, 6])


def test_without_a_cost_per_token_its_weight_plays_no_part() -> None:
    problem = _problem([[8.0], [2.0]])
    assert apply_knobs(problem, replace(PLAIN, token_weight=1.0))[:, 0].tolist() == [8, 2]


def test_the_exponent_sharpens_and_keeps_the_total() -> None:
    problem = _problem([[8.0], [2.0]])
    cost = apply_knobs(problem, replace(PLAIN, exponent=1.3))[:, 0]
    assert cost.sum() == pytest.approx(10)
    assert cost[0] / cost[1] == pytest.approx(4**1.3)
    assert (apply_knobs(_problem([[0.0], [0.0]]), replace(PLAIN, exponent=1.3)) == 0).all()


def test_the_worked_example_of_the_clean_up_and_rows_without_violation() -> None:
    rows = [[4.0, 1.0, 2.0], [0.3, 0.2, 0.1]]
    problem = _problem(rows)
    clean = make_monotone(problem, problem.costs["fisher"])
    assert clean.tolist() == [[4.0, 1.5, 1.5], rows[1]]


@pytest.mark.parametrize(
    "formats",
    [
        pytest.param(("int4-g128-asym", "mxfp4"), id="another family may honestly be worse"),
        pytest.param(("int4-g64", "int4-g128-asym"), id="so may symmetric be"),
        pytest.param(("fp8-e4m3-g128", "fp8-e5m2-g128"), id="equal bits have no order"),
    ],
)
def test_the_clean_up_leaves_formats_alone_that_bits_do_not_order(
    formats: tuple[str, ...],
) -> None:
    problem = _problem([[1.0, 2.0]], formats=formats)
    assert make_monotone(problem, problem.costs["fisher"]).tolist() == [[1.0, 2.0]]


def test_the_clean_up_skips_what_is_not_allowed() -> None:
    problem = _problem([[4.0, 1.0, 2.0]], allowed=[[True, False, True]])
    assert make_monotone(problem, problem.costs["fisher"]).tolist() == [[4.0, 0.0, 2.0]]


def test_costs_never_rise_with_bits_within_a_chain() -> None:
    problem = example_problem(3)
    cost = apply_knobs(problem, Knobs(4.0))
    chain = [n for n, f in enumerate(problem.formats) if f.endswith("asym")]

    def rises(table: FloatArray) -> FloatArray:
        # Groups of 64 and 128 take equal bits in down_proj's 64 columns: the dearer first.
        order = np.lexsort((-table[:, chain], problem.bits[:, chain]), axis=-1)
        return np.diff(np.take_along_axis(table[:, chain], order, axis=1), axis=1)

    assert (rises(problem.costs["fisher"]) > 0).any()
    assert (rises(cost) <= 1e-12 * cost.max()).all()


def test_multipliers_of_family_depth_and_edge() -> None:
    coupled = Unit("both", (*_expert(1, 0, "up_proj").matrices, *_expert(1, 0, "w2").matrices))
    attention = Unit("a", (Matrix("a.o_proj", 10, 10, "attention", 2),))
    units = [_expert(0, 0, "up_proj"), _expert(1, 1, "down_proj"), coupled, attention]
    problem = _problem([[1.0]] * 4, units=units, n_layers=3)
    knobs = Knobs(
        4.0, attention_multiplier=1.5, w2_multiplier=1.44, depth_slope=1.0, edge_multiplier=0.5
    )
    expected = [np.exp(-0.5) * 0.5, 1.44, 1.2, 1.5 * np.exp(0.5) * 0.5]
    assert unit_multipliers(problem, knobs) == pytest.approx(expected)
    assert (unit_multipliers(problem, PLAIN) == 1).all()


@pytest.mark.parametrize(
    ("kind", "projection", "expected"),
    [
        ("shared", "up_proj", 1.5),
        ("shared", "down_proj", 1.5 * 1.44),
        ("dense", "gate_proj", 1.5),
        ("expert", "up_proj", 1.0),
        ("expert", "down_proj", 1.44),
        ("attention", "o_proj", 1.0),
    ],
)
def test_what_is_always_on_has_its_own_multiplier_besides_that_of_its_projection(
    kind: str, projection: str, expected: float
) -> None:
    name = f"model.layers.0.{kind}.{projection}"
    expert = 0 if kind == "expert" else None
    unit = Unit(name, (Matrix(name, 10, 10, kind, 0, expert),))
    problem = _problem([[1.0]], units=[unit])
    knobs = Knobs(4.0, shared_multiplier=1.5, w2_multiplier=1.44)
    assert unit_multipliers(problem, knobs) == pytest.approx([expected])


def test_a_model_of_one_layer_has_no_depth() -> None:
    knobs = Knobs(4.0, depth_slope=1.0, edge_multiplier=2.0)
    assert unit_multipliers(_problem([[1.0]]), knobs).tolist() == [2.0]


def test_planned_parameters_give_the_same_knobs_back() -> None:
    knobs = Knobs(3.3, 0.4, 0.9, depth_slope=-0.5, shared_multiplier=1.7)
    study = optuna.create_study()
    study.enqueue_trial(dict(knob_params(knobs)))
    trial = study.ask()
    assert suggest_knobs(trial, 2.5, 4.25) == knobs
    assert list(trial.params) == ["bits", *KNOB_RANGES] == list(knob_params(knobs))


@pytest.mark.parametrize("low_or_high", ["low", "high"])
def test_the_whole_range_of_every_knob_gives_usable_costs(low_or_high: str) -> None:
    problem = example_problem(0)
    edges = {name: getattr(r, low_or_high) for name, r in KNOB_RANGES.items()}
    cost = apply_knobs(problem, Knobs(4.0, **edges))
    assert np.isfinite(cost).all()
    assert (cost >= 0).all()
    assert cost.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0.0}, "bits = 0.0; use a finite number above 0"),
        ({"error_weight": 1.1}, "error_weight = 1.1; use 0 to 1"),
        ({"token_weight": -0.1}, "token_weight = -0.1; use 0 to 1"),
        ({"shared_multiplier": 0.0}, "shared_multiplier = 0.0; use a finite number above 0"),
        ({"rare_shrinkage": -1.0}, "use 0 or more tokens"),
        ({"exponent": float("nan")}, "exponent = nan"),
        ({"w2_multiplier": 0.0}, "w2_multiplier = 0.0"),
        ({"depth_slope": float("inf")}, "any finite number"),
    ],
)
def test_impossible_knobs_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAIN, **changes)

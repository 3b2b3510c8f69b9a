"""Problems: what `make_problem` refuses, and what a problem derives."""

from typing import Any

import numpy as np
import pytest

from alphaquant.errors import BudgetError, ConfigError, ModelError
from alphaquant.search.problem import make_problem
from alphaquant.testing.allocators import example_problem

PROBLEM = example_problem(0)


def _arguments(**changes: Any) -> dict[str, Any]:
    names = ("units", "formats", "bits", "allowed", "costs", "n_tokens", "n_layers", "features")
    return {name: getattr(PROBLEM, name) for name in names} | changes


def _costs(value: float) -> dict[str, Any]:
    table = PROBLEM.costs["fisher"].copy()
    table[2, 3] = value
    return {**PROBLEM.costs, "fisher": table}


def test_a_valid_problem_derives_weights_layers_and_groups() -> None:
    problem = make_problem(**_arguments())
    assert problem.n_weights.tolist()[:3] == [256 * 256, 2 * 64 * 256, 64 * 256]
    assert problem.families[:3] == ("attention", "expert.w13", "expert.w2")
    assert problem.layers.tolist() == [0] * 9 + [1] * 9
    assert problem.groups.tolist() == [0, *[1, 2] * 4, 3, *[4, 5] * 4]
    assert problem.limit_bits(4.25) == int(4.25 * problem.n_weights.sum())


def test_choices_are_spelled_in_unit_order() -> None:
    choice = np.zeros(len(PROBLEM.units), dtype=np.int64)
    choice[1] = 3
    names = PROBLEM.choice_names(choice)
    assert list(names) == [u.name for u in PROBLEM.units]
    assert list(names.values())[:3] == ["int2-g128-asym", "int3-g128-asym", "int2-g128-asym"]


def test_arrays_are_read_only_copies() -> None:
    bits = PROBLEM.bits.copy()
    problem = make_problem(**_arguments(bits=bits))
    bits[0, 0] = 7
    assert problem.bits[0, 0] != 7
    arrays = (problem.bits, problem.allowed, problem.n_tokens, problem.least_bits)
    for array in (*arrays, *problem.costs.values(), *problem.features.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_costs_that_are_not_allowed_may_be_missing_and_count_as_zero() -> None:
    allowed = PROBLEM.allowed.copy()
    allowed[2, 3] = False
    problem = make_problem(**_arguments(allowed=allowed, costs=_costs(np.nan)))
    assert problem.costs["fisher"][2, 3] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"units": ()}, "0 units and 12 formats", id="nothing to allocate"),
        pytest.param({"units": PROBLEM.units[:1] * 18}, "given twice", id="equal unit names"),
        pytest.param({"formats": ("bf16",) * 12}, "'bf16' is given twice", id="equal formats"),
        pytest.param({"bits": PROBLEM.bits[1:]}, r"bits has shape \[17, 12\]", id="short bits"),
        pytest.param({"n_tokens": np.ones(3)}, r"n_tokens has shape \[3\]", id="short tokens"),
        pytest.param({"costs": {"fisher": PROBLEM.bits}}, "give fisher, error and", id="no error"),
        pytest.param(
            {"costs": {**PROBLEM.costs, "hessian": PROBLEM.bits}},
            "token_fisher, gemq$",
            id="unknown cost",
        ),
        pytest.param(
            {"features": {"age": np.ones(18)}},
            r"\['age'\]; give any of alpha,",
            id="unknown feature",
        ),
        pytest.param(
            {"features": {"variance": np.ones(3)}}, r"variance has shape \[3\]", id="short feature"
        ),
        pytest.param({"allowed": PROBLEM.allowed & False}, "may take no format", id="no format"),
        pytest.param({"bits": PROBLEM.bits * 0}, "0 bits or fewer", id="no bits"),
        pytest.param({"n_layers": 1}, "in layer 1, but n_layers is 1", id="layer out of range"),
    ],
)
def test_disagreeing_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_problem(**_arguments(**changes))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-9])
def test_impossible_measurements_are_refused_with_the_unit(value: float) -> None:
    with pytest.raises(ModelError, match="fisher is negative or not finite for 1 units"):
        make_problem(**_arguments(costs=_costs(value)))
    with pytest.raises(ModelError, match="n_tokens"):
        make_problem(**_arguments(n_tokens=np.full(18, value)))


@pytest.mark.parametrize(
    ("name", "value", "need"),
    [
        ("variance", -1e-9, "negative or not finite for 1 units.*>= 0"),
        ("routing_weight", np.nan, "negative or not finite for 1 units.*calibrate again"),
        ("alpha", 0.0, "0, negative or not finite for 1 units.*> 0.*one row or column"),
        ("alpha_plain", np.nan, "0, negative or not finite for 1 units"),
    ],
)
def test_impossible_features_are_refused(name: str, value: float, need: str) -> None:
    vector = np.ones(18)
    vector[7] = value
    with pytest.raises(ModelError, match=f"^{name} is {need}"):
        make_problem(**_arguments(features={name: vector}))


def test_features_of_zero_are_possible_but_for_exponents() -> None:
    problem = make_problem(**_arguments(features={"variance": np.zeros(18)}))
    assert problem.feature("variance").tolist() == [0] * 18


def test_optional_inputs_may_be_missing_and_are_named() -> None:
    arguments = _arguments(costs={n: PROBLEM.costs[n] for n in ("fisher", "error")})
    del arguments["features"]
    problem = make_problem(*arguments.values())
    assert (problem.has("fisher"), problem.has("gemq"), problem.has("alpha")) == (
        True,
        False,
        False,
    )
    assert (problem.cost("error") == PROBLEM.costs["error"]).all()
    for read, name in ((problem.cost, "gemq"), (problem.feature, "alpha")):
        with pytest.raises(ConfigError, match=f"{name} was not measured, only fisher, error;"):
            read(name)


def test_the_least_bits_are_of_allowed_formats() -> None:
    allowed = PROBLEM.allowed.copy()
    allowed[0] = np.arange(12) >= 6
    problem = make_problem(**_arguments(allowed=allowed))
    assert problem.least_bits[0] == PROBLEM.bits[0, 6:].min()
    assert (problem.least_bits[1:] == PROBLEM.bits[1:].min(axis=1)).all()
    least = int(problem.least_bits.sum())
    problem.check_limit(least)
    with pytest.raises(BudgetError, match=f"{least - 1} bits were asked for.*take {least};"):
        problem.check_limit(least - 1)

"""Published allocators: their costs by hand, and the rules that set each apart."""

import itertools

import numpy as np
import pytest

from alphaquant.search.allocators import ALLOCATORS
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.pools import make_pool
from alphaquant.search.problem import Problem
from alphaquant.search.published import alphaq_cost, gemq_cost, pmq_cost
from alphaquant.testing.allocators import changed, example_problem, take

PROBLEM = example_problem(0, n_layers=3, n_experts=8)
ROWS = np.arange(len(PROBLEM.units))
EXPERTS = np.flatnonzero([unit.kind == "expert" for unit in PROBLEM.units])
OTHERS = np.setdiff1d(ROWS, EXPERTS)
INT4 = PROBLEM.formats.index("int4-g128-asym")


def _choice(name: str, problem: Problem, bits_per_weight: float) -> IntArray:
    limit_bits = problem.limit_bits(bits_per_weight)
    return ALLOCATORS[name].allocate(problem, limit_bits, 0).choice


def _bits(problem: Problem, choice: IntArray) -> IntArray:
    return problem.bits[np.arange(len(choice)), choice]


def _with_features(problem: Problem, **features: FloatArray) -> Problem:
    return changed(problem, features={**problem.features, **features})


def test_the_cost_of_alphaq_by_hand() -> None:
    n_units = len(ROWS)
    alpha, variance = np.full(n_units, 4.0), np.full(n_units, 0.5)
    alpha[EXPERTS[0]] = 2.0
    problem = _with_features(PROBLEM, alpha=alpha, variance=variance)
    pool = make_pool(problem, EXPERTS, False, 10**9)
    bits_per_weight = problem.bits[EXPERTS, INT4] / problem.n_weights[EXPERTS]
    plain = problem.n_weights[EXPERTS] * 0.5 * 2.0 ** (-2 * bits_per_weight)
    cost = alphaq_cost(problem, pool)[:, INT4]
    assert cost[1:] == pytest.approx(plain[1:])
    assert cost[0] == pytest.approx(2 * plain[0])
    assert alphaq_cost(problem, pool, gamma=10.0)[0, INT4] == pytest.approx(2**10 * plain[0])


def test_alphaq_minimizes_its_cost() -> None:
    ordinary = example_problem(4, n_layers=1, n_experts=2)
    problem = take(ordinary, np.arange(1, 5), np.array([0, 3, 6, 10]))
    pool = make_pool(problem, np.arange(4), False, 10**9)
    cost, limit_bits = alphaq_cost(problem, pool), problem.limit_bits(3.5)
    best = min(
        float(cost[np.arange(4), choice].sum())
        for choice in map(np.array, itertools.product(range(4), repeat=4))
        if _bits(problem, choice).sum() <= limit_bits
    )
    solution = ALLOCATORS["alphaq"].allocate(problem, limit_bits, 0)
    assert solution.cost == pytest.approx(best, rel=1e-9)


def test_alphaq_gives_the_heavier_tail_more_bits() -> None:
    alpha = np.full(len(ROWS), 8.0)
    alpha[EXPERTS[::2]] = 2.0
    problem = _with_features(PROBLEM, alpha=alpha, variance=np.ones(len(ROWS)))
    bits = _bits(problem, _choice("alphaq", problem, 3.3))[EXPERTS]
    per_weight = bits / problem.n_weights[EXPERTS]
    assert per_weight[::2].mean() > per_weight[1::2].mean() + 0.5


def test_the_cost_of_pmq_by_hand() -> None:
    tokens, weight = np.zeros(len(ROWS)), np.zeros(len(ROWS))
    tokens[1:5] = 30, 30, 10, 10  # two experts of the first layer
    weight[1:5] = 6, 6, 4, 4
    error = np.zeros(PROBLEM.bits.shape)
    error[1:5, INT4] = 9, 16, 1, 3
    costs = {**PROBLEM.costs, "error": error}
    problem = changed(_with_features(PROBLEM, routing_weight=weight), n_tokens=tokens, costs=costs)
    cost = pmq_cost(problem, make_pool(problem, EXPERTS, True, 10**9))
    assert cost[0, INT4] == pytest.approx(0.75 * 0.6**1.5 * 5)
    assert cost[1, INT4] == pytest.approx(0.25 * 0.4**1.5 * 2)
    assert (cost[2:] == 0).all()


def test_the_cost_of_gemq_is_the_sum_of_its_table() -> None:
    cost = gemq_cost(PROBLEM, make_pool(PROBLEM, EXPERTS, True, 10**9))
    table = PROBLEM.costs["gemq"]
    assert cost[0] == pytest.approx(table[1] + table[2])


@pytest.mark.parametrize("name", ["pmq", "gemq"])
@pytest.mark.parametrize("bits_per_weight", [2.4, 3.0, 4.25])
def test_an_expert_has_one_format(name: str, bits_per_weight: float) -> None:
    choice = _choice(name, PROBLEM, bits_per_weight)[EXPERTS].reshape(-1, 2)
    assert (choice[:, 0] == choice[:, 1]).all()
    assert len(set(choice[:, 0].tolist())) > 1


def test_alphaq_may_split_an_expert() -> None:
    choice = _choice("alphaq", PROBLEM, 3.0)[EXPERTS].reshape(-1, 2)
    assert (choice[:, 0] != choice[:, 1]).any()


@pytest.mark.parametrize("name", ["alphaq", "pmq", "gemq"])
def test_what_is_no_routed_expert_takes_the_cheapest_4_bit_format(name: str) -> None:
    for bits_per_weight in (3.0, 4.25, 7.0):
        assert (_choice(name, PROBLEM, bits_per_weight)[OTHERS] == INT4).all()


@pytest.mark.parametrize("name", ["alphaq", "pmq", "gemq"])
def test_what_is_no_routed_expert_is_lowered_until_it_fits(name: str) -> None:
    least = int(PROBLEM.least_bits.sum())
    allocate = ALLOCATORS[name].allocate
    at = PROBLEM.bits[OTHERS].sum(axis=0) - PROBLEM.least_bits[OTHERS].sum()
    assert (allocate(PROBLEM, least + int(at[INT4]), 0).choice[OTHERS] == INT4).all()
    assert (allocate(PROBLEM, least + int(at[INT4]) - 1, 0).choice[OTHERS] == INT4 - 1).all()
    assert (allocate(PROBLEM, least, 0).choice[OTHERS] == 0).all()


def test_the_4_bit_class_is_the_next_one_in_menus_without_it() -> None:
    for formats, expected in (
        (("int2-g128-asym", "int5-g128-asym", "int8-g128"), "int5-g128-asym"),
        (("int2-g128-asym", "int3-g128-asym"), "int3-g128-asym"),
    ):
        problem = example_problem(0, formats=formats)
        choice = _choice("gemq", problem, 9.0)
        assert formats[choice[0]] == expected


def test_a_model_without_experts_is_searched_whole() -> None:
    problem = take(PROBLEM, OTHERS, np.arange(len(PROBLEM.formats)))
    for name in ("alphaq", "pmq", "gemq"):
        assert _choice(name, problem, 7.0).min() > INT4


def test_gemq_moves_bits_between_layers_and_pmq_does_not() -> None:
    factor = np.array([1.0, 1.0, 1e-4])[PROBLEM.layers][:, None]
    costs = {name: table * factor for name, table in PROBLEM.costs.items()}
    # Tokens are shared within a layer, so the layer's importance is in the tables alone.
    problem = changed(PROBLEM, costs=costs)

    def layer_bits(name: str) -> FloatArray:
        bits = _bits(problem, _choice(name, problem, 3.0))[EXPERTS]
        totals = np.bincount(problem.layers[EXPERTS], weights=bits)
        return totals / np.bincount(problem.layers[EXPERTS], weights=problem.n_weights[EXPERTS])

    pmq, gemq = layer_bits("pmq"), layer_bits("gemq")
    assert pmq.max() - pmq.min() < 0.1
    assert gemq[:2].min() > gemq[2] + 0.3


def test_gemq_starves_no_layer() -> None:
    factor = np.where(PROBLEM.layers == 2, 0.0, 1.0)[:, None]
    problem = changed(PROBLEM, costs={n: table * factor for n, table in PROBLEM.costs.items()})
    choice = _choice("gemq", problem, 3.0)[EXPERTS]
    widths = [int(problem.formats[f][3]) for f in choice[problem.layers[EXPERTS] == 2]]
    # All experts could have 2 bits but not 3: one has 3, the others stay at 2.
    assert sorted(widths) == [2] * 14 + [3] * 2


def test_alpha_hill_orders_experts_by_alpha() -> None:
    choice = _choice("alpha-hill", PROBLEM, 3.5)
    per_weight = _bits(PROBLEM, choice) / PROBLEM.n_weights
    alpha = PROBLEM.features["alpha"] * PROBLEM.n_weights
    experts = EXPERTS.reshape(-1, 2)
    score = alpha[experts].sum(axis=1) / PROBLEM.n_weights[experts].sum(axis=1)
    w13 = per_weight[experts[:, 0]][np.argsort(score)]
    assert (np.diff(w13) <= 0).all()
    # Two bits apart at most, and formats are up to one bit apart.
    assert 1.0 < w13[0] - w13[-1] <= 3.0


def test_alpha_hill_does_not_see_the_plain_alpha() -> None:
    plain = PROBLEM.features["alpha_plain"][::-1]
    other = _with_features(PROBLEM, alpha_plain=plain)
    assert (_choice("alpha-hill", PROBLEM, 3.5) == _choice("alpha-hill", other, 3.5)).all()


def test_constant_alpha_is_uniform() -> None:
    # Of 256 columns each, so that a format takes equal bits per weight in all units.
    wide = take(PROBLEM, EXPERTS[::2], np.arange(len(PROBLEM.formats)))
    problem = _with_features(wide, alpha=np.full(len(wide.units), 4.0))
    limit_bits = int(problem.bits[:, INT4].sum())
    assert (ALLOCATORS["alpha-hill"].allocate(problem, limit_bits, 0).choice == INT4).all()


def _groups(problem: Problem) -> dict[tuple[int, str], IntArray]:
    """Units that vLLM loads as one: the example has no q, k and v."""
    fused: dict[tuple[int, str], list[int]] = {}
    for row, unit in enumerate(problem.units):
        part = unit.name.rpartition(".")[2]
        role = (
            "experts"
            if unit.kind == "expert"
            else "qkv"
            if part in "q_proj k_proj v_proj"
            else part
        )
        fused.setdefault((unit.layer, role), []).append(row)
    return {key: np.array(rows) for key, rows in fused.items()}


@pytest.mark.parametrize("bits_per_weight", [2.5, 3.5, 6.0])
def test_prismaquant_gives_what_is_fused_one_format_and_the_rest_its_own(
    bits_per_weight: float,
) -> None:
    choice = _choice("prismaquant", PROBLEM, bits_per_weight)
    assert all(len(set(choice[rows])) == 1 for rows in _groups(PROBLEM).values())
    assert len(set(choice.tolist())) > 2


def test_prismaquant_is_the_least_fisher_cost_of_fused_choices() -> None:
    problem = take(example_problem(4, n_layers=2, n_experts=2), np.arange(10), np.array([0, 3, 6]))
    limit_bits, fused = problem.limit_bits(3.5), list(_groups(problem).values())
    costs, best = problem.costs["fisher"], np.inf
    for formats in itertools.product(range(3), repeat=len(fused)):
        choice = np.empty(len(problem.units), dtype=np.int64)
        for rows, column in zip(fused, formats, strict=True):
            choice[rows] = column
        if _bits(problem, choice).sum() <= limit_bits:
            best = min(best, float(costs[np.arange(len(choice)), choice].sum()))
    solution = ALLOCATORS["prismaquant"].allocate(problem, limit_bits, 0)
    assert solution.cost == pytest.approx(best, rel=2e-3)
    assert solution.lower_bound <= best * (1 + 1e-9)


def test_prismaquant_takes_units_one_by_one_where_fused_ones_have_no_format_in_common() -> None:
    allowed = PROBLEM.allowed.copy()
    low = PROBLEM.bits.sum(0).argmin()
    allowed[EXPERTS[::2], low] = False
    allowed[EXPERTS[1::2]] = False
    allowed[EXPERTS[1::2], low] = True
    choice = _choice("prismaquant", changed(PROBLEM, allowed=allowed), 5.0)
    assert set(choice[EXPERTS[1::2]]) == {low}
    assert low not in choice[EXPERTS[::2]]

"""The contract of allocators, to run over any of them, and problems to run it on.

    for problem in example_problems():
        check_allocator(allocator, problem)

Checks raise AssertionError with what was broken. The problems are drawn, not measured.
"""

from collections.abc import Iterator

import numpy as np

from alphaquant.errors import BudgetError
from alphaquant.search.allocators import Allocator
from alphaquant.search.problem import Problem, make_problem
from alphaquant.search.solver import Solution
from alphaquant.spaces.formats import DEFAULT_MENU, parse_format
from alphaquant.spaces.units import Matrix, Unit

_ROWS, _COLS = 64, 256


def example_problem(
    seed: int, n_layers: int = 2, n_experts: int = 4, formats: tuple[str, ...] = DEFAULT_MENU[:12]
) -> Problem:
    """A small MoE: per layer one attention unit, and a w13 and a w2 unit per expert.

    Costs fall by 4 per bit with log-normal noise; token counts are log-normal; the last expert of
    each layer got no token and has no cost.

    Args:
        seed: of all draws.
        n_layers: decoder layers.
        n_experts: experts per layer.
        formats: canonical names of the menu.
    """
    rng = np.random.default_rng(seed)
    units = [u for layer in range(n_layers) for u in _layer_units(layer, n_experts)]
    bits = np.array([[u.storage_bits(parse_format(f)) for f in formats] for u in units])
    n_weights = np.array([[u.n_weights] for u in units])
    n_tokens = np.floor(rng.lognormal(6.0, 1.5, len(units)))
    n_tokens[[u.name.startswith(_expert_prefix(u.layer, n_experts - 1)) for u in units]] = 0
    used = (n_tokens / n_tokens.max())[:, None]
    nominal = n_weights * 4.0 ** -(bits / n_weights) * used
    costs = {name: nominal * rng.lognormal(0.0, 0.5, bits.shape) for name in ("fisher", "error")}
    allowed = np.ones(bits.shape, dtype=np.bool_)
    return make_problem(units, formats, bits, allowed, costs, n_tokens, n_layers)


def example_problems() -> Iterator[Problem]:
    """Problems that allocators must survive: ordinary, one unit, one format, no cost at all."""
    yield example_problem(0)
    ordinary = example_problem(1)
    yield _part(ordinary, np.array([0]), np.arange(len(ordinary.formats)), 1.0)
    yield _part(ordinary, np.arange(len(ordinary.units)), np.array([3]), 1.0)
    yield _part(ordinary, np.arange(len(ordinary.units)), np.array([3, 6]), 0.0)


def check_allocator(allocator: Allocator, problem: Problem) -> None:
    """Feasible and total at tight, middling and ample limits; repeatable; refuses the impossible.

    Args:
        allocator: what is tested.
        problem: what it must solve.
    """
    least = int(np.where(problem.allowed, problem.bits, problem.bits.max()).min(axis=1).sum())
    most = int(np.where(problem.allowed, problem.bits, 0).max(axis=1).sum())
    for limit_bits in (least, (least + most) // 2, most, 2 * most):
        solution = allocator.allocate(problem, limit_bits, 0)
        _check_solution(allocator.name, problem, solution, limit_bits)
        again = allocator.allocate(problem, limit_bits, 0)
        assert np.array_equal(solution.choice, again.choice), (
            f"{allocator.name}: two calls with seed 0 differ at {limit_bits} bits"
        )
    try:
        allocator.allocate(problem, least - 1, 0)
    except BudgetError:
        return
    raise AssertionError(f"{allocator.name}: no BudgetError at {least - 1} bits, least is {least}")


def _check_solution(name: str, problem: Problem, solution: Solution, limit_bits: int) -> None:
    rows = np.arange(len(problem.units))
    assert solution.choice.shape == rows.shape, f"{name}: not one format per unit"
    assert problem.allowed[rows, solution.choice].all(), f"{name}: a format that is not allowed"
    n_bits = int(problem.bits[rows, solution.choice].sum())
    assert n_bits == solution.bits, f"{name}: says {solution.bits} bits, takes {n_bits}"
    assert n_bits <= limit_bits, f"{name}: {n_bits} bits, limit {limit_bits}"
    assert solution.lower_bound <= solution.cost, f"{name}: bound above cost"
    assert len(problem.choice_names(solution.choice)) == len(problem.units), f"{name}: not total"


def _part(problem: Problem, rows: np.ndarray, columns: np.ndarray, factor: float) -> Problem:
    """The problem of some units [n] and formats [m], with its costs times a factor."""
    at = np.ix_(rows, columns)
    return make_problem(
        [problem.units[row] for row in rows],
        [problem.formats[column] for column in columns],
        problem.bits[at],
        problem.allowed[at],
        {name: table[at] * factor for name, table in problem.costs.items()},
        problem.n_tokens[rows],
        problem.n_layers,
    )


def _expert_prefix(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}."


def _layer_units(layer: int, n_experts: int) -> Iterator[Unit]:
    name = f"model.layers.{layer}.self_attn.o_proj"
    yield Unit(name, (Matrix(name, _COLS, _COLS, "attention", layer),))
    for expert in range(n_experts):
        prefix = _expert_prefix(layer, expert)
        gate, up = (
            Matrix(f"{prefix}{part}", _ROWS, _COLS, "expert", layer, expert)
            for part in ("gate_proj", "up_proj")
        )
        yield Unit(f"{prefix}w13", (gate, up))
        down = Matrix(f"{prefix}down_proj", _COLS, _ROWS, "expert", layer, expert)
        yield Unit(down.name, (down,))

"""The contract of allocators, to run over any of them, and problems to run it on.

    for problem in example_problems().values():
        check_allocator(allocator, problem)

Checks raise AssertionError with what was broken. The problems are drawn, not measured.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from alphaquant.errors import BudgetError
from alphaquant.search.allocators import Allocator
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import COSTS, OPTIONAL_COSTS, Problem, make_problem
from alphaquant.search.solver import Solution
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Matrix, Unit

EXAMPLE_MENU: tuple[str, ...] = (
    *("int2-g128-asym", "int2-g64-asym", "int2-g32-asym"),
    *("int3-g128-asym", "int3-g64-asym", "int3-g32-asym"),
    *("int4-g128-asym", "int4-g64-asym", "int4-g32-asym"),
    *("int5-g128-asym", "int6-g128", "int8-g128"),
)
"""Formats by nominal bits; the default menu may change, what tests compute by hand may not."""

_ROWS, _COLS = 64, 256


def example_problem(
    seed: int, n_layers: int = 2, n_experts: int = 4, formats: tuple[str, ...] = EXAMPLE_MENU
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
    names = (*COSTS, *OPTIONAL_COSTS)
    costs = {name: nominal * rng.lognormal(0.0, 0.5, bits.shape) for name in names}
    allowed = np.ones(bits.shape, dtype=np.bool_)
    features = {
        "alpha": rng.uniform(2.5, 7.0, len(units)),
        "alpha_plain": rng.uniform(2.5, 7.0, len(units)),
        "variance": rng.lognormal(-7.0, 0.3, len(units)),
        "routing_weight": n_tokens * rng.uniform(0.1, 0.9, len(units)),
        "active_share": n_tokens / n_tokens.max(),
    }
    return make_problem(units, formats, bits, allowed, costs, n_tokens, n_layers, features)


def example_problems() -> dict[str, Problem]:
    """Problems that allocators must survive, by what is special about them; all inputs are there.

    Formats are columns of the menu by nominal bits: 3 is int3, 6 is int4, 11 is int8.
    """
    ordinary = example_problem(1)
    n_units, n_formats = ordinary.bits.shape
    rows, columns = np.arange(n_units), np.arange(n_formats)
    experts = np.flatnonzero([unit.kind == "expert" for unit in ordinary.units])
    one_each = np.zeros(ordinary.allowed.shape, dtype=np.bool_)
    one_each[rows, rows % n_formats] = True
    mixed = one_each | (rows % 3 > 0)[:, None]
    return {
        "ordinary": example_problem(0),
        "one unit": take(ordinary, rows[:1], columns),
        "one expert unit": take(ordinary, experts[:1], columns),
        "experts alone": take(ordinary, experts, columns),
        "no experts": take(ordinary, np.setdiff1d(rows, experts), columns),
        "one format": take(ordinary, rows, columns[3:4]),
        "formats of equal bits": example_problem(2, formats=("int4-g64", "int4-g32", "mxfp4")),
        "one allowed format per unit": changed(ordinary, allowed=one_each),
        "some units with one allowed format": changed(ordinary, allowed=mixed),
        "no cost": changed(ordinary, costs={n: 0.0 * t for n, t in ordinary.costs.items()}),
        "no tokens": changed(
            ordinary,
            n_tokens=np.zeros(n_units),
            features=_with(ordinary, routing_weight=0.0, active_share=0.0),
        ),
        "constant alpha": changed(ordinary, features=_with(ordinary, alpha=4.0, alpha_plain=4.0)),
    }


def changed(problem: Problem, **changes: Any) -> Problem:
    """The problem with some arguments of `make_problem` replaced."""
    given = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return make_problem(**given | changes)


def take(problem: Problem, rows: IntArray, columns: IntArray) -> Problem:
    """The problem of some units, int64 [n], and formats, int64 [m]."""
    at = np.ix_(rows, columns)
    return changed(
        problem,
        units=[problem.units[row] for row in rows],
        formats=[problem.formats[column] for column in columns],
        bits=problem.bits[at],
        allowed=problem.allowed[at],
        costs={name: table[at] for name, table in problem.costs.items()},
        n_tokens=problem.n_tokens[rows],
        features={name: vector[rows] for name, vector in problem.features.items()},
    )


def check_allocator(allocator: Allocator, problem: Problem) -> None:
    """Feasible and total from the tightest to ample limits; repeatable; refuses the impossible.

    Args:
        allocator: what is tested.
        problem: what it must solve.
    """
    least = int(problem.least_bits.sum())
    most = int(np.where(problem.allowed, problem.bits, 0).max(axis=1).sum())
    for percent in (0, 1, 5, 10, 25, 50, 75, 100, 200):
        limit_bits = least + (most - least) * percent // 100
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


def _with(problem: Problem, **constants: float) -> dict[str, FloatArray]:
    """The features of a problem with some of them constant."""
    n_units = len(problem.units)
    return {**problem.features, **{n: np.full(n_units, c) for n, c in constants.items()}}


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

"""Groups of units that share a format, for studies that choose formats directly.

A sampler suggests one level per group, the most bits that the group may take. What it suggests is
made feasible by the solver: formats above a group's level are closed, and of the rest the additive
costs choose the best that fits the limit. A suggestion that fits is taken as it is.

Letters: U units, F formats, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.search.solver import solve

N_BUCKETS = 4
"""Buckets that experts are sorted into by utilization, per family."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Units merged into groups of one format; build it with `make_groups`.

    Attributes:
        names: G names, such as `layer 3 expert.w2` or `expert.w2, use 2 of 4`.
        members: int64 [U], the group of each unit.
        options: per group int64 [n], its formats by ascending bits.
        bits: int64 [G, F], bits of the whole group.
        allowed: bool [G, F], formats that every member may take.
    """

    names: tuple[str, ...]
    members: IntArray
    options: tuple[IntArray, ...]
    bits: IntArray
    allowed: BoolArray

    def merge(self, cost: FloatArray) -> FloatArray:
        """Costs of the groups, float64 [G, F], from those of the units [U, F]."""
        merged = np.zeros((len(self.names), cost.shape[1]))
        np.add.at(merged, self.members, cost)
        return merged


class IntSuggester(Protocol):
    """What `suggest_groups` needs of an `optuna.Trial`."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """An integer in [low, high] for a named parameter."""
        ...


def _by_layer(problem: Problem) -> list[str]:
    return [
        f"layer {u.layer} {family}"
        for u, family in zip(problem.units, problem.families, strict=True)
    ]


def _by_utilization(problem: Problem) -> list[str]:
    """Experts by their rank in use among the same family of their layer, the rest by family."""
    names = list(problem.families)
    for group in range(int(problem.groups.max()) + 1):
        rows = np.flatnonzero(problem.groups == group)
        if problem.units[rows[0]].kind != "expert":
            continue
        rank = np.argsort(np.argsort(problem.n_tokens[rows], kind="stable"), kind="stable")
        for row, bucket in zip(rows, rank * N_BUCKETS // len(rows), strict=True):
            names[row] += f", use {bucket + 1} of {N_BUCKETS}"
    return names


GROUPINGS: Mapping[str, Callable[[Problem], list[str]]] = MappingProxyType(
    {"layer": _by_layer, "utilization": _by_utilization}
)
"""How units are grouped, by name: the group of each unit."""


def check_grouping(name: str) -> None:
    """Refuse a grouping that does not exist.

    Raises:
        ConfigError: naming those that do.
    """
    if name not in GROUPINGS:
        raise ConfigError(f"unknown grouping {name!r}; use one of {', '.join(GROUPINGS)}")


def make_groups(problem: Problem, grouping: str) -> Groups:
    """Merge units into groups.

    Args:
        problem: the units.
        grouping: one of `GROUPINGS`.

    Raises:
        ConfigError: an unknown grouping, or a group without a format that all members may take.
    """
    check_grouping(grouping)
    of_unit = GROUPINGS[grouping](problem)
    names = tuple(dict.fromkeys(of_unit))
    members = np.array([names.index(name) for name in of_unit], dtype=np.int64)
    bits = np.zeros((len(names), len(problem.formats)), dtype=np.int64)
    np.add.at(bits, members, problem.bits)
    allowed = np.ones_like(bits, dtype=np.bool_)
    np.logical_and.at(allowed, members, problem.allowed)
    for name, row in zip(names, allowed, strict=True):
        if not row.any():
            raise ConfigError(
                f"the units of {name} have no format in common; give --formats that all of them "
                "load, or another grouping"
            )
    options = tuple(
        np.flatnonzero(row)[np.argsort(b[row], kind="stable")]
        for row, b in zip(allowed, bits, strict=True)
    )
    return Groups(names, members, options, bits, allowed)


def suggest_groups(trial: IntSuggester, groups: Groups) -> dict[str, int]:
    """Ask a trial for the level of every group: a place among its formats by ascending bits."""
    return {
        name: trial.suggest_int(name, 0, len(options) - 1)
        for name, options in zip(groups.names, groups.options, strict=True)
    }


def fit_groups(
    groups: Groups, cost: FloatArray, levels: Mapping[str, int], limit_bits: int
) -> IntArray:
    """The choice of every unit, int64 [U], that a suggestion stands for within a limit.

    Args:
        groups: the groups.
        cost: float64 [U, F], decides where the suggestion does not fit.
        levels: from `suggest_groups`.
        limit_bits: total bits allowed.

    Raises:
        BudgetError: one format per group does not fit the limit at all.
    """
    wanted = np.array(
        [o[levels[name]] for name, o in zip(groups.names, groups.options, strict=True)]
    )
    rows = np.arange(len(groups.names))
    if int(groups.bits[rows, wanted].sum()) <= limit_bits:
        return wanted[groups.members]
    is_open = groups.allowed & (groups.bits <= groups.bits[rows, wanted][:, None])
    least = int(np.where(is_open, groups.bits, np.iinfo(np.int64).max).min(axis=1).sum())
    if least > limit_bits:
        raise BudgetError(
            f"one format per group takes {least} bits at least, the limit is {limit_bits}; raise "
            "the budget or add smaller formats"
        )
    solution = solve(groups.merge(cost), groups.bits, is_open, limit_bits)
    return solution.choice[groups.members]

"""The allocator's knobs: how the two measured cost tables become the one that the solver adds up.

Theory fixes the defaults; a study moves them and lets the true divergence decide. Every setting is
feasible, because knobs change costs and never bits. Order of `apply_knobs`:

1. shrink rare units toward their group,       c' = a c + (1 - a) prior,   a = n / (n + n0)
2. mix in log space, R scaled to S per group,  c = S^(1 - w) (R sum S / sum R)^w;
   S itself is mixed in the same way with the Fisher cost per token
3. clean up noise within a chain of formats    isotonic regression over bits
4. exponent, total kept                        c^gamma sum c / sum c^gamma
5. multipliers of family, depth, edge          relative to expert.w13 in the middle of the model

Why isotonic regression and not a running minimum: a format that noise makes dearer than a smaller
one is not on the hull, so the solver never sees it and a running minimum changes nothing. What
hurts is the smaller one's lucky low estimate; pooling the two (the least-squares fit that never
rises with bits) takes half of that back. It is only valid where more bits cannot be worse: inside
one chain (int symmetric, int asymmetric, nl, fp, mxfp; int and nl in super-blocks), not across
(mxfp4 at 4.25 bits may honestly be worse than int4-g128-asym at 4.16), and not between formats of
equal bits (elements e4m3 and e5m2).

Source: docs/algorithms.md, sections 2 (S, R) and 3 (shrinkage, the knobs).
Letters: U units, F formats, S fisher cost, R error cost, n calibration tokens, g (layer, family).
"""

from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Protocol

import numpy as np
from scipy.optimize import isotonic_regression

from alphaquant.errors import ConfigError
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import ENDS


@dataclass(frozen=True)
class Range:
    """Where a knob may be searched, inclusive."""

    low: float
    high: float
    is_log: bool = False


_SHARES = ("error_weight", "token_weight")

UNSEEN_TOKENS = 3.0
"""95 % upper bound on the mean of a count that was seen to be zero (the rule of three)."""

KNOB_RANGES: dict[str, Range] = {
    "error_weight": Range(0.0, 1.0),
    "token_weight": Range(0.0, 1.0),
    "rare_shrinkage": Range(4.0, 1024.0, is_log=True),
    "exponent": Range(0.7, 1.3),
    "attention_multiplier": Range(0.5, 2.0, is_log=True),
    "w2_multiplier": Range(0.5, 2.0, is_log=True),
    "depth_slope": Range(-1.0, 1.0),
    "edge_multiplier": Range(0.5, 2.0, is_log=True),
    "shared_multiplier": Range(0.5, 2.0, is_log=True),
}
"""What `suggest_knobs` searches besides `bits`."""


@dataclass(frozen=True)
class Knobs:
    """One setting of the allocator.

    Attributes:
        bits: mean stored bits per weight that the allocation may use.
        error_weight: share of the error cost in the log-space mix, 0 to 1.
        token_weight: share of the Fisher cost per token in the Fisher cost, log-space, 0 to 1.
        rare_shrinkage: tokens n0 at which a unit's own cost counts half; 0 trusts every unit.
        exponent: gamma > 0; above 1 sharpens the differences between costs.
        attention_multiplier: weight of attention units relative to w13.
        w2_multiplier: weight of down projections relative to w13; units that couple both get its
            square root. There is no multiplier for w13, since only ratios matter to the solver.
        depth_slope: log of the last layer's weight over the first's.
        edge_multiplier: weight of the first and last layer.
        shared_multiplier: weight of shared experts and dense MLPs relative to w13.
    """

    bits: float
    error_weight: float = 0.25
    token_weight: float = 0.5
    rare_shrinkage: float = 64.0
    exponent: float = 1.0
    attention_multiplier: float = 1.0
    w2_multiplier: float = 1.0
    depth_slope: float = 0.0
    edge_multiplier: float = 1.0
    shared_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no formula above can take.

        Raises:
            ConfigError: a knob that is not finite or has no meaning.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not isfinite(value) or not _is_possible(field.name, value):
                raise ConfigError(f"knob {field.name} = {value}; use {_possible_text(field.name)}")


class FloatSuggester(Protocol):
    """What `suggest_knobs` needs of an `optuna.Trial`."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A value in [low, high] for a named parameter."""
        ...


def suggest_knobs(trial: FloatSuggester, bits_low: float, bits_high: float) -> Knobs:
    """Ask a trial for every knob.

    Args:
        trial: an Optuna trial.
        bits_low: fewest stored bits per weight to propose.
        bits_high: most stored bits per weight to propose.
    """
    bits = trial.suggest_float("bits", bits_low, bits_high)
    values = {
        name: trial.suggest_float(name, r.low, r.high, log=r.is_log)
        for name, r in KNOB_RANGES.items()
    }
    return Knobs(bits, **values)


def knob_params(knobs: Knobs) -> dict[str, float]:
    """The parameters that make `suggest_knobs` return these knobs, to plan a trial."""
    return {name: float(value) for name, value in asdict(knobs).items()}


def apply_knobs(problem: Problem, knobs: Knobs) -> FloatArray:
    """The cost of each unit in each format.

    Args:
        problem: the measured costs.
        knobs: the setting; `bits` plays no part here.

    Returns:
        float64 [U, F], >= 0, zero where not allowed.
    """
    fisher = shrink_rare(problem, _fisher(problem, knobs.token_weight), knobs.rare_shrinkage)
    error = shrink_rare(problem, problem.costs["error"], knobs.rare_shrinkage)
    error = error * _error_scale(problem.groups, fisher, error)[:, None]
    cost = fisher ** (1 - knobs.error_weight) * error**knobs.error_weight
    cost = _raise_keeping_total(make_monotone(problem, cost), knobs.exponent)
    return cost * unit_multipliers(problem, knobs)[:, None] * problem.allowed


def _fisher(problem: Problem, token_weight: float) -> FloatArray:
    """The mix of both Fisher costs, float64 [U, F]; where no token cost was measured, the one."""
    if token_weight == 0 or not problem.has("token_fisher"):
        return problem.costs["fisher"]
    whole, single = problem.costs["fisher"], problem.costs["token_fisher"]
    single = single * _error_scale(problem.groups, whole, single)[:, None]
    return np.asarray(whole ** (1 - token_weight) * single**token_weight, dtype=np.float64)


def shrink_rare(problem: Problem, cost: FloatArray, rare_shrinkage: float) -> FloatArray:
    """Pull the cost per token of rarely reached units toward their group's.

    A unit's cost grows with the tokens that reach it, so it is the cost per token and weight that
    units of a group share. A unit that no token reached counts as if `UNSEEN_TOKENS` had.

    Worked example, n0 = 64: a unit of 100 weights, 16 tokens and cost 1 has 1/1600 per token and
    weight; in a group with 1/800 it gets 1600 * (16/80 * 1/1600 + 64/80 * 1/800) = 1.8.

    Args:
        problem: units with token counts and (layer, family) groups.
        cost: float64 [U, F].
        rare_shrinkage: n0 in tokens, >= 0; 0 returns the cost.

    Returns:
        float64 [U, F].
    """
    if rare_shrinkage == 0:
        return cost
    n_groups = int(problem.groups.max()) + 1
    exposure = problem.n_tokens * problem.n_weights  # [U]
    totals, exposures = np.zeros((2, n_groups, cost.shape[1]))
    np.add.at(totals, problem.groups, cost * problem.allowed)
    np.add.at(exposures, problem.groups, exposure[:, None] * problem.allowed)
    rates = np.divide(totals, exposures, out=np.zeros_like(totals), where=exposures > 0)
    at_least = np.maximum(problem.n_tokens, UNSEEN_TOKENS) * problem.n_weights
    prior = rates[problem.groups] * at_least[:, None]
    own = (problem.n_tokens / (problem.n_tokens + rare_shrinkage))[:, None]
    return (own * cost + (1 - own) * prior) * problem.allowed


def make_monotone(problem: Problem, cost: FloatArray) -> FloatArray:
    """Make costs non-increasing in bits within each chain of comparable formats.

    Worked example: int3 4, int4 1, int5 2 becomes 4, 1.5, 1.5.

    Args:
        problem: bits and allowed formats.
        cost: float64 [U, F].

    Returns:
        float64 [U, F]; rows without a violation are unchanged to the last bit.
    """
    clean = cost.copy()
    for chain in _chains(problem.formats):
        # Of equal bits the dearer first: that is no violation.
        order = chain[np.lexsort((-cost[:, chain], problem.bits[:, chain]), axis=-1)]
        ranked = np.take_along_axis(cost, order, axis=1)
        is_allowed = np.take_along_axis(problem.allowed, order, axis=1)
        floor = np.minimum.accumulate(np.where(is_allowed, ranked, np.inf), axis=1)
        for unit in np.flatnonzero(((ranked > floor) & is_allowed).any(axis=1)):
            columns = order[unit, is_allowed[unit]]
            clean[unit, columns] = isotonic_regression(cost[unit, columns], increasing=False).x
    return clean


def unit_multipliers(problem: Problem, knobs: Knobs) -> FloatArray:
    """float64 [U]: the product of family, depth and edge multipliers of each unit.

    What is beside the layers has none.
    """
    by_part = {
        **dict.fromkeys(ENDS.values(), 1.0),
        "attention": knobs.attention_multiplier,
        "w13": 1.0,
        "w2": knobs.w2_multiplier,
        "all": knobs.w2_multiplier**0.5,
    }
    family = np.array([by_part[name.rsplit(".", 1)[-1]] for name in problem.families])
    is_always_on = np.array(
        [name.split(".")[0] in ("shared", "dense") for name in problem.families]
    )
    family = np.where(is_always_on, family * knobs.shared_multiplier, family)
    last = problem.n_layers - 1
    is_beside = problem.layers > last
    depth = problem.layers / last - 0.5 if last else np.zeros(len(problem.units))
    depth = np.where(is_beside, 0.0, depth)
    is_edge = (problem.layers == 0) | (problem.layers == last)
    edge = np.where(is_edge, knobs.edge_multiplier, 1.0)
    return np.asarray(family * np.exp(knobs.depth_slope * depth) * edge, dtype=np.float64)


def _is_possible(name: str, value: float) -> bool:
    if name in _SHARES:
        return 0 <= value <= 1
    if name == "rare_shrinkage":
        return value >= 0
    return name == "depth_slope" or value > 0


def _possible_text(name: str) -> str:
    known = {
        **dict.fromkeys(_SHARES, "0 to 1"),
        "rare_shrinkage": "0 or more tokens",
        "depth_slope": "any finite number, searched in -1 to 1",
    }
    return known.get(name, "a finite number above 0")


def _error_scale(groups: IntArray, fisher: FloatArray, error: FloatArray) -> FloatArray:
    """float64 [U]: fisher per error of each unit's group; of all units where a group has none.

    Zero if no unit has any error, as with a menu of bf16 alone.
    """
    of_fisher = np.bincount(groups, weights=fisher.sum(axis=1))
    of_error = np.bincount(groups, weights=error.sum(axis=1))
    overall = of_fisher.sum() / of_error.sum() if of_error.sum() > 0 else 0.0
    scale = np.full(len(of_fisher), overall)
    np.divide(of_fisher, of_error, out=scale, where=(of_fisher > 0) & (of_error > 0))
    return np.asarray(scale[groups], dtype=np.float64)


def _raise_keeping_total(cost: FloatArray, exponent: float) -> FloatArray:
    total = float(cost.sum())
    if exponent == 1 or total == 0:
        return cost
    powered = (cost / total) ** exponent
    return np.asarray(powered * (total / float(powered.sum())), dtype=np.float64)


def _chains(formats: tuple[str, ...]) -> list[IntArray]:
    """Columns of the formats that are better the more bits they take, as int64 arrays."""
    chains: dict[tuple[str, bool, int], list[int]] = {}
    for column, name in enumerate(formats):
        fmt = parse_format(name)
        chains.setdefault((fmt.family, fmt.symmetric, fmt.super_size), []).append(column)
    return [np.array(columns, dtype=np.int64) for columns in chains.values()]

"""Published allocators: alpha-Hill, AlphaQ, PMQ, GEMQ and PrismaQuant, of one contract.

What all of them share here, and where that departs from the papers:

* A budget counts stored bits (codes, scales, zeros, padding), not nominal widths, and units are
  weighted with what they store; in the papers all experts are of one size.
* The candidates are the menu's formats. Costs come from the quantizer that will be used, where the
  papers round to nearest to measure them. AlphaQ measures nothing and keeps its model 2^(-2b).
* The papers search routed experts only. Everything else (attention, shared experts, dense layers)
  takes the menu's 4-bit class, or the highest smaller level that fits together with the smallest
  experts. A model without routed experts has all its units searched.
* PMQ and GEMQ give an expert one format. Where no format is allowed for all units of an expert, or
  the smallest such formats exceed the limit, units are searched one by one.
* Integer programs are solved to a certified 0.1 %; the rule of the next point may add to the gap.
* PMQ and GEMQ keep, in each layer, one expert at the highest and one at the second-highest of the
  widths 1, 2, 3, with budgets of 1.5 to 2.5 bits. Menus and budgets are free here, so the widths
  move with the budget, see `solve_keeping_wide`: 3 and 2 bits for budgets between int2 and int3.
* PrismaQuant has a menu of three formats, measures a Fisher per matrix and multiplies it with the
  rendered matrix's squared error, and measures experts' own KL; the rule here has our menu and our
  Fisher costs, which see the rendered matrix too. Its search among finished models by their KL is
  what a study does anyway.

Sources: AlphaQuant (formats by percentiles of alpha); AlphaQ, arXiv 2606.04980 (integer program,
ratio mode, alpha by FARMS); PMQ, MC-MoE, arXiv 2410.06270 (integer program per block); GEMQ, arXiv
2605.23078 (global integer program); PrismaQuant 0.16.2 (multiple-choice knapsack over units that
vLLM loads as one).

Letters: U units, F formats, R units that are searched, P pool members (experts or units).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import rankdata

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.levels import make_levels
from alphaquant.search.pools import (
    Pool,
    code_widths,
    expert_members,
    fused_pool,
    layer_parts,
    least_bits,
    make_pool,
    solve_closely,
    solve_keeping_wide,
    with_bound,
)
from alphaquant.search.problem import Problem
from alphaquant.search.solver import Solution
from alphaquant.spaces.formats import parse_format

_FIXED_WIDTH = 4
_ALPHA_SPREAD = 2.0
"""Bits per weight between the lowest and the highest alpha: one above and one below the middle."""


Cost = Callable[[Problem, Pool], FloatArray]
"""Costs of the members of a pool, float64 [P, F]."""


@dataclass(frozen=True)
class ExpertAllocator:
    """Searches the routed experts, everything else stays at the 4-bit class.

    Attributes:
        name: see `alphaquant.search.allocators.Allocator`.
        needs: likewise.
        make_cost: what is minimized.
        is_whole: an expert is one member; otherwise each of its units is.
        is_layerwise: each layer has its own budget of equal bits per weight above the least.
        keeps_wide: each layer keeps two wider experts.
    """

    name: str
    needs: tuple[str, ...]
    make_cost: Cost
    is_whole: bool = True
    is_layerwise: bool = False
    keeps_wide: bool = True

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `alphaquant.search.allocators.Allocator`."""
        problem.check_limit(limit_bits)
        searched = _searched(problem)
        others = np.setdiff1d(np.arange(len(problem.units)), searched)
        others_least = int(problem.least_bits[others].sum())
        pool = make_pool(problem, searched, self.is_whole, limit_bits - others_least)
        choice = np.zeros(len(problem.units), dtype=np.int64)
        spare = limit_bits - int(least_bits(pool.bits, pool.allowed))
        choice[others] = _fixed_choice(problem, others, spare)
        left = limit_bits - int(problem.bits[others, choice[others]].sum())
        cost = bound = 0.0
        for part, part_bits in layer_parts(pool, left) if self.is_layerwise else [(pool, left)]:
            solution = self._solve(problem, part, part_bits)
            choice[part.rows] = solution.choice[part.member]
            cost, bound = cost + solution.cost, bound + solution.lower_bound
        n_bits = int(problem.bits[np.arange(len(choice)), choice].sum())
        return with_bound(Solution(choice, cost, n_bits, bound, 0.0), bound)

    def _solve(self, problem: Problem, pool: Pool, limit_bits: int) -> Solution:
        cost = self.make_cost(problem, pool)
        if self.keeps_wide:
            return solve_keeping_wide(pool, cost, limit_bits, code_widths(problem))
        return solve_closely(cost, pool.bits, pool.allowed, limit_bits)


@dataclass(frozen=True)
class AlphaHillAllocator:
    """The lower alpha, the more bits: from one above the middle to one below for the highest.

    Units are ranked by the alpha (FARMS) of their expert, or their own outside routed experts. A
    unit of rank share r (0 the lowest alpha, 1 the highest, ties in the middle) takes its highest
    level of at most t + 1 - 2r bits per weight, with the largest t that fits.

    AlphaQuant gives fixed percentiles of all linears the highest, the middle and the lowest of
    three formats; AlphaQ's ratio mode gives the lowest alphas of a layer w + 1, the highest w - 1
    bits. Both fix the shares, so neither meets a budget; the line does, with as many levels as the
    menu has. The rule has no cost, so the solution's cost and gap are 0.
    """

    name: str = "alpha-hill"
    needs: tuple[str, ...] = ("alpha",)

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `alphaquant.search.allocators.Allocator`."""
        problem.check_limit(limit_bits)
        rows = np.arange(len(problem.units))
        member = expert_members(problem, rows)
        weights = np.bincount(member, weights=problem.n_weights)
        weighted = problem.n_weights * problem.feature("alpha")
        alpha = np.bincount(member, weights=weighted) / weights
        share = (rankdata(alpha) - 0.5) / len(alpha)
        levels = make_levels(problem, rows)
        positions = levels.fill(_ALPHA_SPREAD * (0.5 - share[member]), limit_bits)
        return Solution(levels.choice(positions), 0.0, levels.total_bits(positions), 0.0, 0.0)


@dataclass(frozen=True)
class FusedAllocator:
    """PrismaQuant: the least Fisher cost where all that an engine fuses has one format.

    Where that does not fit units are searched one by one.
    """

    name: str = "prismaquant"
    needs: tuple[str, ...] = ()

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `alphaquant.search.allocators.Allocator`."""
        problem.check_limit(limit_bits)
        pool = fused_pool(problem, limit_bits)
        cost = pool.sum(problem.cost("fisher"))
        solution = solve_closely(cost, pool.bits, pool.allowed, limit_bits)
        return replace(solution, choice=solution.choice[pool.member])


def alphaq_cost(problem: Problem, pool: Pool, gamma: float = 1.0) -> FloatArray:
    """AlphaQ: s n v 4^-b, s = (median alpha / alpha)^gamma, b stored bits per weight, [P, F].

    The paper sums s v 4^-b over matrices of one size; n weights of a member stand for its size
    here, and b counts scales and zeros.

    Args:
        problem: with `alpha` (FARMS, as in the paper) and `variance`.
        pool: units, since the paper gives each matrix of an expert its own width.
        gamma: sharpness; 1 is the default of the paper's program, its ablation prefers 10 and
            more.
    """
    alpha = problem.feature("alpha")[pool.rows]
    n_weights = problem.n_weights[pool.rows]
    importance = (np.median(alpha) / alpha) ** gamma * problem.feature("variance")[pool.rows]
    nominal = 4.0 ** -(problem.bits[pool.rows] / n_weights[:, None])
    cost = np.zeros(pool.bits.shape)
    np.add.at(cost, pool.member, (importance * n_weights)[:, None] * nominal)
    return cost * pool.allowed


def pmq_cost(problem: Problem, pool: Pool) -> FloatArray:
    """PMQ: phi w^1.5 eps, [P, F].

    phi is an expert's share of its layer's tokens, w of its routing weight, eps the Frobenius norm
    of the error of the block's output. The paper measures the norm with the whole expert
    quantized; here it is the root of the summed squared errors of its units.

    Args:
        problem: with `routing_weight`.
        pool: experts.
    """
    tokens, weight = pool.share(problem.n_tokens), pool.share(problem.feature("routing_weight"))
    return (tokens * weight**1.5)[:, None] * np.sqrt(pool.sum(problem.cost("error")))


def gemq_cost(problem: Problem, pool: Pool) -> FloatArray:
    """GEMQ: squared gradient times squared output error, summed over an expert's units, [P, F].

    Args:
        problem: with `gemq`; the paper perturbs the whole expert at once.
        pool: experts.
    """
    return pool.sum(problem.cost("gemq"))


PUBLISHED = (
    AlphaHillAllocator(),
    ExpertAllocator("alphaq", ("alpha", "variance"), alphaq_cost, False, False, False),
    ExpertAllocator("pmq", ("routing_weight",), pmq_cost, is_layerwise=True),
    ExpertAllocator("gemq", ("gemq",), gemq_cost),
    FusedAllocator(),
)


def _searched(problem: Problem) -> IntArray:
    """The units of routed experts; all units where there are none."""
    rows = np.array([unit.kind == "expert" for unit in problem.units])
    return np.flatnonzero(rows) if rows.any() else np.arange(len(rows))


def _fixed_choice(problem: Problem, rows: IntArray, limit_bits: int) -> IntArray:
    """The formats of units [R] that are not searched: the 4-bit class, or what fits below it."""
    nominal = [(f.nominal_bits, f.bits) for f in map(parse_format, problem.formats)]
    classes = [(stored, i) for i, (stored, width) in enumerate(nominal) if width >= _FIXED_WIDTH]
    column = min(classes)[1] if classes else int(np.argmax([stored for stored, _ in nominal]))
    levels = make_levels(problem, rows, problem.bits[rows, column])
    return levels.choice(levels.fill(np.zeros(len(rows)), limit_bits))

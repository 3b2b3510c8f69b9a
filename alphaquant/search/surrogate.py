"""A surrogate of the true divergence, fitted to all evaluations that were paid for.

The additive cost with one weight per (layer, family) group: KL = sum_g w_g C_g, C_g the sum of the
costs of the group's units in their formats. Weights are fitted by ridge regression on relative
errors, pulled toward their common level, and never negative. Additive within groups, so the solver
takes it as it takes any cost; what it learns is which parts of the model the costs misjudge.

Letters: U units, F formats, G groups, n evaluations.
"""

import numpy as np
from scipy.optimize import lsq_linear

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem


def group_costs(problem: Problem, cost: FloatArray, choices: IntArray) -> FloatArray:
    """The cost of each group under each choice, float64 [n, G].

    Args:
        problem: gives the groups.
        cost: float64 [U, F].
        choices: int64 [n, U].
    """
    taken = cost[np.arange(cost.shape[0]), choices]  # [n, U]
    found = np.zeros((len(choices), int(problem.groups.max()) + 1))
    np.add.at(found.T, problem.groups, taken.T)
    return found


def fit_group_weights(
    problem: Problem, cost: FloatArray, choices: IntArray, kl: FloatArray, ridge: float = 1.0
) -> FloatArray:
    """The weight of each unit's group, float64 [U], >= 0.

    Worked example: one group, costs 1 and 2, KL 2 and 4 give a weight of 2.

    Args:
        problem: gives the groups.
        cost: float64 [U, F], additive.
        choices: int64 [n, U], evaluated assignments.
        kl: float64 [n], their KL, above 0 where it should count.
        ridge: evaluations that the prior, equal weights, counts as.
    """
    by_group = group_costs(problem, cost, choices)
    total = by_group.sum(axis=1)
    counts = (kl > 0) & (total > 0)
    if not counts.any():
        return np.ones(len(problem.units))
    by_group, kl, total = by_group[counts], kl[counts], total[counts]
    level = float(np.exp(np.median(np.log(kl / total))))
    # Rows are relative errors; a group's pull is in proportion to the share that it has of them.
    rows = level * by_group / kl[:, None]  # [n, G], sums near 1
    share = np.sqrt(np.square(rows).mean(axis=0))
    pulls = np.diag(np.sqrt(ridge) * share)
    found = lsq_linear(
        np.concatenate([rows, pulls]),
        np.concatenate([np.ones(len(rows)), np.diag(pulls)]),
        bounds=(0.0, np.inf),
    )
    weights = np.where(share > 0, found.x, 1.0) * level
    return np.asarray(weights[problem.groups], dtype=np.float64)

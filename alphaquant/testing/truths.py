"""A true divergence with interactions, small enough to try every assignment.

    case = tiny_truth(seed)

Every (unit, format) moves the output along a vector a, and the divergence of window w is
1/2 |sum_u a(u, f(u))|^2 over the coordinates of w: what is left of a Fisher term when units do not
act apart. The additive cost is its diagonal.

Letters: U units, F formats, S coordinates, N windows.
"""

from dataclasses import dataclass, field
from itertools import product

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem, make_problem
from alphaquant.spaces.units import Matrix, Unit


@dataclass
class QuadraticTruth:
    """See the header; counts what it is asked.

    Attributes:
        moves: float64 [U, F, S].
        n_windows: N, a divisor of S.
        n_measured: windows asked for.
    """

    moves: FloatArray
    n_windows: int
    n_measured: int = field(default=0)

    def measure(self, choice: IntArray, n_windows: int) -> FloatArray:
        """KL of the first windows."""
        self.n_measured += n_windows
        return self.every(choice[None])[0, :n_windows]

    def accept(self, choice: IntArray) -> None:
        """Nothing is remembered."""

    def every(self, choices: IntArray) -> FloatArray:
        """KL of all windows of many choices [C, U], float64 [C, N]."""
        total = self.moves[np.arange(choices.shape[1]), choices].sum(axis=1)  # [C, S]
        squares = 0.5 * np.square(total).reshape(len(choices), self.n_windows, -1)
        return np.asarray(squares.mean(axis=2), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class TinyTruth:
    """A problem, its truth, and the choices that there are.

    Attributes:
        problem: the units, with the diagonal as both costs.
        truth: the divergence.
        choices: int64 [F ^ U, U], every assignment.
        limit_bits: a budget between the cheapest and the dearest.
    """

    problem: Problem
    truth: QuadraticTruth
    choices: IntArray
    limit_bits: int

    def optimum(self) -> float:
        """The least true KL within the limit."""
        bits = self.problem.bits[np.arange(self.choices.shape[1]), self.choices].sum(axis=1)
        fitting = self.choices[bits <= self.limit_bits]
        return float(self.truth.every(fitting).mean(axis=1).min())


def tiny_truth(
    seed: int, n_units: int = 6, n_formats: int = 4, correlation: float = 0.2
) -> TinyTruth:
    """A random case.

    Args:
        seed: of everything random.
        n_units: U, over two layers of attention and experts.
        n_formats: F, of 2 bits and more.
        correlation: of the units' moves along one common direction, the interactions.
    """
    rng = np.random.default_rng(seed)
    bits_per_weight = 2 + np.arange(n_formats)
    sizes = 64 * rng.integers(1, 4, n_units)
    units = tuple(_unit(i, int(size)) for i, size in enumerate(sizes))
    scale = rng.lognormal(0, 1, n_units)[:, None] * 2.0**-bits_per_weight
    noise = rng.normal(size=(n_units, n_formats, 32))
    common = rng.normal(size=32)
    moves = np.sqrt(1 - correlation) * noise + np.sqrt(correlation) * common
    moves = moves * scale[:, :, None] * np.sqrt(sizes)[:, None, None] / 8
    truth = QuadraticTruth(moves, 8)
    cost = 0.5 * np.square(moves).mean(axis=2)
    bits = sizes[:, None] * bits_per_weight[None, :]
    problem = make_problem(
        units,
        [f"int{b}-g64" for b in bits_per_weight],
        bits,
        np.ones_like(bits, dtype=np.bool_),
        {"fisher": cost, "error": cost},
        np.full(n_units, 100.0),
        2,
    )
    least, most = int(bits.min(axis=1).sum()), int(bits.max(axis=1).sum())
    limit_bits = int(least + rng.uniform(0.2, 0.8) * (most - least))
    choices = np.array(list(product(range(n_formats), repeat=n_units)), dtype=np.int64)
    return TinyTruth(problem, truth, choices, limit_bits)


def _unit(index: int, n_weights: int) -> Unit:
    layer, place = index % 2, index // 2
    kind = "attention" if place == 0 else "expert"
    name = (
        f"model.layers.{layer}.{'self_attn' if place == 0 else f'mlp.experts.{place}'}.down_proj"
    )
    expert = None if place == 0 else place
    return Unit(name, (Matrix(name, n_weights // 64, 64, kind, layer, expert),))

"""Blocks of units and their levels: what a sweep on the true divergence moves.

A block is the units of one part of one layer: its routed experts, its attention, its shared or
dense MLP. Within a block the additive costs decide: level k is the block's optimum at price k, a
price being the cost that one bit is worth. Prices are common to all blocks, so one level
everywhere is the additive optimum of its size, and a sweep only finds out where the truth wants a
block ahead of the others or behind.

Letters: U units, F formats, K levels, n units of one block.
"""

from dataclasses import dataclass

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.search.solver import frontier


@dataclass(frozen=True, eq=False)
class Block:
    """Some units that move together along their own additive optimum.

    Attributes:
        layer: their layer.
        part: `attention`, `expert`, `shared` or `dense`.
        units: int64 [n], their rows in the problem.
        choices: int64 [K, n], options at each level; level 0 is the richest.
        bits: int64 [K], descending, not strictly.
        cost: float64 [K], the additive cost, ascending.
    """

    layer: int
    part: str
    units: IntArray
    choices: IntArray
    bits: IntArray
    cost: FloatArray


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """All blocks of a problem with the prices of their levels.

    Attributes:
        blocks: every unit is in exactly one.
        prices: float64 [K], ascending, cost per bit.
    """

    blocks: tuple[Block, ...]
    prices: FloatArray

    def choice(self, levels: IntArray) -> IntArray:
        """The option of every unit, int64 [U], with each block at its level [n blocks]."""
        chosen = np.zeros(sum(len(b.units) for b in self.blocks), dtype=np.int64)
        for block, level in zip(self.blocks, levels.tolist(), strict=True):
            chosen[block.units] = block.choices[level]
        return chosen

    def bits(self, levels: IntArray) -> int:
        """Total bits with each block at its level."""
        return sum(
            int(b.bits[level]) for b, level in zip(self.blocks, levels.tolist(), strict=True)
        )

    def unit_weights(self, levels: IntArray, strength: float) -> FloatArray:
        """How much more each unit's cost should count so that the solver agrees with the levels.

        The solver would bring a block to the price p_b of its level at a common price p if its
        costs were p / p_b times as large. p is the mean of log p_b over units; `strength` is an
        exponent, 0 for weights of 1.

        Worked example: two blocks of one unit each at prices 1 and 4 give 2 and 1/2.

        Args:
            levels: int64 [n blocks].
            strength: 0 to 1.

        Returns:
            float64 [U].
        """
        logs = np.log(self.prices)[levels]
        weights = np.zeros(sum(len(b.units) for b in self.blocks))
        for block, log_price in zip(self.blocks, logs.tolist(), strict=True):
            weights[block.units] = log_price
        return np.asarray(np.exp(strength * (weights.mean() - weights)), dtype=np.float64)


def make_blocks(problem: Problem, cost: FloatArray, n_levels: int) -> BlockGrid:
    """The blocks of a problem, each with a level at every one of `n_levels` common prices.

    Prices are a geometric grid from below the flattest hull step of all units, where every block
    is at its richest useful point, to above the steepest, where every block is at its cheapest.

    Args:
        problem: units and formats.
        cost: float64 [U, F], additive.
        n_levels: K, at least 2.
    """
    keys = [(u.layer, u.kind) for u in problem.units]
    rows = {key: np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)}
    paths = {
        key: frontier(cost[r], problem.bits[r], problem.allowed[r]) for key, r in rows.items()
    }
    slopes = np.concatenate([path.slopes for path in paths.values()])
    if not slopes.size:  # one option for every unit
        slopes = np.ones(1)
    prices = np.geomspace(slopes.min() * (1 - 1e-9), slopes.max() * (1 + 1e-9), n_levels)
    blocks = []
    for (layer, part), units in rows.items():
        path = paths[layer, part]
        points = np.searchsorted(-path.slopes, -prices)  # steps steeper than the price are taken
        choices = np.stack([path.choice(point) for point in points.tolist()])
        blocks.append(Block(layer, part, units, choices, path.bits[points], path.cost[points]))
    return BlockGrid(tuple(blocks), prices)


def next_level(block: Block, level: int, step: int) -> int | None:
    """The next level of other bits in a direction (1 cheaper, -1 richer), None at the end."""
    other = level + step
    while 0 <= other < len(block.bits):
        if block.bits[other] != block.bits[level]:
            return other
        other += step
    return None

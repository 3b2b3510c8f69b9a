"""Levels: the allowed formats of a unit as a ladder of stored bits.

Published allocators speak of bit-widths, of which a unit has one each. Here a level is a number of
stored bits; where several formats of a unit take the same bits, the one with the lower Fisher cost
is the level. Rules that move along the ladder (uniform, thresholds on a score, mutations) need no
solver.

Worked example, one unit of 100 weights, formats of 200, 400, 300 and 400 bits with Fisher costs 9,
2, 4 and 1: the levels are 200, 300, 400 bits in columns 0, 2, 3.

Letters: U units, F formats, R the units that are asked for.
"""

from dataclasses import dataclass

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem

_NO_BITS = np.iinfo(np.int64).max // 4


@dataclass(frozen=True, eq=False)
class Levels:
    """The ladders of R units.

    Attributes:
        bits: int64 [R, F], ascending; beyond a unit's last level a number above all limits.
        columns: int64 [R, F], the format of each level.
        n_levels: int64 [R], at least 1.
        n_weights: float64 [R].
    """

    bits: IntArray
    columns: IntArray
    n_levels: IntArray
    n_weights: FloatArray

    def choice(self, positions: IntArray) -> IntArray:
        """int64 [R], the formats of positions [R] on the ladders."""
        return self.columns[np.arange(len(positions)), positions]

    def total_bits(self, positions: IntArray) -> int:
        """Bits of positions [R]."""
        return int(self.bits[np.arange(len(positions)), positions].sum())

    def at_most(self, cap_bits: IntArray) -> IntArray:
        """Highest positions [R] of at most `cap_bits` [R]; the lowest where there is none."""
        return np.asarray(np.maximum((self.bits <= cap_bits[:, None]).sum(axis=1) - 1, 0))

    def fill(self, offsets: FloatArray, limit_bits: int) -> IntArray:
        """The highest common water line that fits.

        At water line t each unit stands at its highest level of at most t + offset bits per
        weight, at its lowest if there is none.

        Args:
            offsets: float64 [R], bits per weight that a unit gets above the line.
            limit_bits: total of the units, at least what their lowest levels take.

        Returns:
            int64 [R], positions.
        """
        heights = self.bits / self.n_weights[:, None] - offsets[:, None]
        lines = np.unique(heights[self.bits < _NO_BITS])
        best = np.zeros(len(self.bits), dtype=np.int64)
        assert self.total_bits(best) <= limit_bits
        low, high = 0, len(lines)
        while low < high:  # the total never falls with the line
            middle = (low + high) // 2
            positions = np.maximum((heights <= lines[middle]).sum(axis=1) - 1, 0)
            if self.total_bits(positions) <= limit_bits:
                best, low = positions, middle + 1
            else:
                high = middle
        return best


def make_levels(problem: Problem, rows: IntArray, cap_bits: IntArray | None = None) -> Levels:
    """The ladders of some units.

    Args:
        problem: formats, bits and Fisher costs.
        rows: int64 [R], units.
        cap_bits: int64 [R], levels above it are left out, except a unit's lowest; None keeps all.
    """
    masked = np.where(problem.allowed[rows], problem.bits[rows], _NO_BITS)
    columns = np.lexsort((problem.costs["fisher"][rows], masked), axis=-1)
    bits = np.take_along_axis(masked, columns, axis=1)
    is_extra = np.zeros(bits.shape, dtype=np.bool_)
    is_extra[:, 1:] = bits[:, 1:] == bits[:, :-1]
    if cap_bits is not None:
        is_extra[:, 1:] |= bits[:, 1:] > cap_bits[:, None]
    order = np.argsort(is_extra | (bits == _NO_BITS), axis=1, kind="stable")
    bits = np.take_along_axis(np.where(is_extra, _NO_BITS, bits), order, axis=1)
    return Levels(
        bits,
        np.take_along_axis(columns, order, axis=1),
        (bits < _NO_BITS).sum(axis=1),
        problem.n_weights[rows],
    )

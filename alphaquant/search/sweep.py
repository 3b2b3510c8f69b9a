"""One sweep over all budgets: lazy greedy steps of blocks, judged by the true divergence.

Downward every block starts at its richest level, and the step with the least harm per bit saved is
taken again and again; upward every block starts at its cheapest, and the step with the most gain
per bit spent is taken. Every state passed is a point of a front.

Lazy: a step's rate that was measured in an earlier state orders the queue until the step comes to
its head; only then it is measured anew, and if it is still best, taken (Minoux 1978; exact greedy
for submodular functions, which divergence is only nearly).

Racing: a step is measured on 8, 16, 32, ... windows, paired with the current state's, and no
further once two standard errors separate it from the next in the queue.

Letters: N windows, n blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.blocks import BlockGrid, next_level


class Truth(Protocol):
    """The true divergence of assignments; each measurement costs time."""

    @property
    def n_windows(self) -> int:
        """Windows of the evaluation text, N."""

    def measure(self, choice: IntArray, n_windows: int) -> FloatArray:
        """KL of the first `n_windows` windows, float64, with option choice[u] for every unit."""

    def accept(self, choice: IntArray) -> None:
        """Tell that the next measurements are near this choice."""


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep measures.

    Attributes:
        first_windows: of a race's first round; each round doubles.
        most_windows: of its last round, and of every state.
        separation: standard errors at which a race ends.
    """

    first_windows: int = 8
    most_windows: int = 16
    separation: float = 2.0


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """A state of the sweep.

    Attributes:
        levels: int64 [n], the level of each block.
        bits: total bits.
        kl: float64, per window, those of the race's last round.
    """

    levels: IntArray
    bits: int
    kl: FloatArray


@dataclass(frozen=True, order=True)
class _Step:
    """A block's next step.

    Attributes:
        rate: KL that it adds per bit, of the choice's change in bits; negative going upward.
        block: whose.
        state: steps taken when the rate was measured, -1 if never.
    """

    rate: float
    block: int
    state: int


def sweep(
    grid: BlockGrid, truth: Truth, direction: int, settings: SweepSettings | None = None
) -> Iterator[SweepPoint]:
    """Walk from one end of the levels to the other, yielding every state.

    Args:
        grid: the blocks.
        truth: measures states.
        direction: 1 from the richest levels down, -1 from the cheapest up.
        settings: how to measure.
    """
    walk = _Walk(grid, truth, direction, settings or SweepSettings())
    yield walk.point()
    # What was never measured comes first: all blocks at the start, then each that has moved.
    queue = [_Step(-np.inf, b, -1) for b in range(len(grid.blocks)) if walk.target(b) is not None]
    heapify(queue)
    while queue:
        step = heappop(queue)
        if step.state < walk.n_taken:
            rival = queue[0].rate if queue else np.inf
            heappush(queue, _Step(walk.race(step.block, rival), step.block, walk.n_taken))
            continue
        walk.take(step.block)
        if walk.target(step.block) is not None:
            heappush(queue, _Step(-np.inf, step.block, -1))
        yield walk.point()


class _Walk:
    """The state of a sweep: levels of the blocks and the KL of the windows there."""

    def __init__(
        self, grid: BlockGrid, truth: Truth, direction: int, settings: SweepSettings
    ) -> None:
        start = 0 if direction == 1 else len(grid.prices) - 1
        self._grid, self._truth = grid, truth
        self._direction, self._settings = direction, settings
        self._levels = np.full(len(grid.blocks), start, dtype=np.int64)
        self._n_windows = min(settings.most_windows, truth.n_windows)
        self.n_taken = 0
        self._enter()

    def _enter(self) -> None:
        choice = self._grid.choice(self._levels)
        self._truth.accept(choice)
        self._kl = self._truth.measure(choice, self._n_windows)

    def point(self) -> SweepPoint:
        """The current state."""
        return SweepPoint(self._levels.copy(), self._grid.bits(self._levels), self._kl)

    def target(self, block: int) -> int | None:
        """The level that a block would step to, None at the end."""
        return next_level(self._grid.blocks[block], int(self._levels[block]), self._direction)

    def race(self, block: int, rival: float) -> float:
        """KL per bit that a block's step adds, as exactly as telling it from a rival's needs."""
        level = self.target(block)
        assert level is not None, "blocks at their end are not in the queue"
        levels = self._levels.copy()
        levels[block] = level
        choice, n_bits = self._grid.choice(levels), self._n_bits(block, level)
        n = min(self._settings.first_windows, self._n_windows)
        while True:
            found = (self._truth.measure(choice, n) - self._kl[:n]) / n_bits
            rate = float(found.mean())
            error = float(found.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
            if n == self._n_windows or abs(rate - rival) > self._settings.separation * error:
                return rate
            n = min(2 * n, self._n_windows)

    def take(self, block: int) -> None:
        """Take a block's step."""
        level = self.target(block)
        assert level is not None, "blocks at their end are not in the queue"
        self._levels[block] = level
        self.n_taken += 1
        self._enter()

    def _n_bits(self, block: int, level: int) -> int:
        bits = self._grid.blocks[block].bits
        return abs(int(bits[level] - bits[self._levels[block]]))

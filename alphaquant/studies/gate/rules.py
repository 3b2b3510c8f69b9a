"""The rules of the gate: from measurements on held-out text to what is published.

A is better than B beyond noise where the whole 95 % interval of the paired difference of their KL
is on A's side (`alphaquant.studies.gate.intervals`). All rules are made of that:

    uniform   a searched point is published only where it is better beyond noise than every uniform
              format of the menu of at most its bits; else the best of those that it does not beat
              is published in its place
    front     of what is left a row goes where a published row of at most its bits is there that it
              is not better than beyond noise: more bytes must buy something that can be told from
              luck. With further objectives that row must be no worse in all of these too
    best      the choice on the evaluation text within the budget, unless a point of the same size
              or less is better than it beyond noise. It stands for the budget: it is compared with
              all uniform formats within that. Where it does not beat all, `best.json` is the best
              point within the budget that does, and without one the best of those formats.
              `best.json` always stays; rows that are smaller by less than `SAME_SIZE` are of its
              size, and give way to it

Runs no model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphaquant.evaluators.base import mean_and_stderr
from alphaquant.evaluators.divergence import Divergence
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.gate.intervals import bootstrap_interval
from alphaquant.studies.gate.winner import best_of
from alphaquant.studies.store.study import TrialRow

SAME_SIZE = 0.001
"""Part of its bits by which a row may be smaller than `best.json` and still be of its size."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A measured assignment.

    Attributes:
        assignment: of a point, of a uniform format, or of both.
        point: the trial whose point it is.
        uniform: name of its format where it has a single one.
        n_bits: stored bits.
        found: per window.
        others: a point's further objectives on the evaluation text, the less the better; None
            where they were not measured.
    """

    assignment: Assignment
    point: TrialRow | None
    uniform: str | None
    n_bits: int
    found: Divergence
    others: tuple[float, ...] | None = ()

    @property
    def name(self) -> str:
        """`int4-g64` or `trial-012`."""
        if self.uniform is not None:
            return self.uniform
        assert self.point is not None, "what is not uniform is a point"
        return f"trial-{self.point.number:03d}"

    @property
    def label(self) -> str:
        """Its name in a sentence."""
        return self.name if self.uniform is None else f"uniform {self.name}"

    @property
    def kl(self) -> float:
        """The mean; infinite where the model broke down."""
        mean, _ = mean_and_stderr(self.found.kl)
        return math.inf if math.isnan(mean) else mean

    @property
    def order(self) -> tuple[float, int, str]:
        """Better ones first: by KL, then by bits, then by name."""
        return self.kl, self.n_bits, self.name


@dataclass(frozen=True)
class Verdicts:
    """What the rules say.

    Attributes:
        first: the choice on the evaluation text within the budget.
        best: the search's best: that one, or the point that held-out text puts in its place.
        winner: the uniform format that is `best.json`; None where the best itself is.
        published: names of the rows with a configuration.
        takers: what is published in the place of a withheld point, by its name.
        reasons: why a row is not published, by its name.
    """

    first: Candidate
    best: Candidate
    winner: Candidate | None
    published: frozenset[str]
    takers: Mapping[str, Candidate]
    reasons: Mapping[str, str]

    def replaced_by(self, name: str) -> tuple[str, ...]:
        """The points in whose place a row is published."""
        return tuple(point for point, taker in self.takers.items() if taker.name == name)


@dataclass(frozen=True)
class Rules:
    """Decides.

    Attributes:
        candidates: points and uniform formats, each assignment once.
        menu: formats that may be published.
        limit_bits: the budget.
        domains: of the held-out windows.
    """

    candidates: Sequence[Candidate]
    menu: Sequence[str]
    limit_bits: int
    domains: Sequence[str]

    def verdicts(self) -> Verdicts:
        """Apply all rules."""
        first = self._first()
        best, winner = self._best_and_winner(self._best(first))
        chosen = winner or best
        points = [c for c in self.candidates if c.point is not None]
        unbeaten = {c: None if c is chosen else self._taker(c, best) for c in points}
        dominated = self._dominated(chosen, [u or c for c, u in unbeaten.items()])
        takers, reasons = {}, {c.name: _reason(c, d, best) for c, d in dominated.items()}
        for point, uniform in unbeaten.items():
            taker = uniform or dominated.get(point)
            if taker is not None:
                takers[point.name] = dominated.get(taker, taker)
                reasons[point.name] = f"withheld: {_reason(point, taker, best)}"
        kept = {(u or c) for c, u in unbeaten.items()} - dominated.keys() | {chosen}
        names = frozenset(c.name for c in kept)
        return Verdicts(first, best, winner, names, takers, reasons)

    def is_better(self, candidate: Candidate, rival: Candidate) -> bool:
        """Whether a candidate is better than another beyond noise; False for a single window."""
        if math.isinf(candidate.kl) or len(self.domains) == 1:
            return False
        if math.isinf(rival.kl):
            return True
        gains = (rival.found.kl.double() - candidate.found.kl.double()).numpy(force=True)
        if gains.min() > 0:  # then so is every mean of a resample
            return True
        return gains.mean() > 0 and bootstrap_interval(gains, self.domains)[0] > 0

    def lowest_uniform(self, candidate: Candidate, best: Candidate) -> Candidate | None:
        """The best other uniform format that a candidate is compared with, in the menu or not."""
        size = self.limit_bits if candidate is best else candidate.n_bits
        others = [c for c in self.candidates if c.uniform is not None and c is not candidate]
        return min((c for c in others if c.n_bits <= size), key=lambda c: c.order, default=None)

    def _first(self) -> Candidate:
        within = {c.point.number: c for c in self._within() if c.point}
        return within[best_of([c.point for c in within.values() if c.point]).number]

    def _within(self) -> list[Candidate]:
        """The points within the budget."""
        return [c for c in self.candidates if c.point and c.n_bits <= self.limit_bits]

    def _best(self, best: Candidate) -> Candidate:
        """Follow those that are better beyond noise; their means fall, so it ends."""
        while True:
            size = best.n_bits * (1 + SAME_SIZE)
            better = [c for c in self._within() if c.n_bits <= size and self.is_better(c, best)]
            if not better:
                return best
            best = min(better, key=lambda c: c.order)

    def _best_and_winner(self, best: Candidate) -> tuple[Candidate, Candidate | None]:
        """The best, and the uniform format in its place where no point beats all of them."""
        limit = self.limit_bits
        winner = self._unbeaten(best, limit)
        if winner is None:
            return best, None
        passing = [c for c in self._within() if self._unbeaten(c, limit) is None]
        if passing:
            return min(passing, key=lambda c: c.order), None
        return best, winner

    def _taker(self, point: Candidate, best: Candidate) -> Candidate | None:
        """The uniform format in the place of a point; None where it beats all, or is the best."""
        taker = self._unbeaten(point, self.limit_bits if point is best else point.n_bits)
        return None if taker is point else taker

    def _unbeaten(self, candidate: Candidate, n_bits: int) -> Candidate | None:
        """The best uniform format of the menu of at most so many bits that is not beaten.

        Of uniform formats the best is published, so that one needs no lead over the others.
        """
        menu = [c for c in self.candidates if c.uniform in self.menu and c.n_bits <= n_bits]
        ordered = sorted(menu, key=lambda c: c.order)
        if candidate.uniform is not None:
            return ordered[0] if ordered else None
        return next((u for u in ordered if not self.is_better(candidate, u)), None)

    def _dominated(
        self, chosen: Candidate, wanted: Sequence[Candidate]
    ) -> dict[Candidate, Candidate]:
        """Of the rows to be published, those that go, with the row that says so.

        Args:
            chosen: `best.json`, which stays.
            wanted: rows that no uniform format is in the place of.
        """
        kept, dominated = [chosen], {}
        ordered = sorted({*wanted} - {chosen}, key=lambda c: (c.n_bits, c.kl, c.name))
        for row in ordered:
            rivals = [k for k in kept if self._dominates(k, row, is_chosen=k is chosen)]
            if rivals:
                dominated[row] = min(rivals, key=lambda c: c.order)
            else:
                kept.append(row)
        return dominated

    def _dominates(self, kept: Candidate, row: Candidate, *, is_chosen: bool) -> bool:
        """Whether a published row leaves no reason to publish another one."""
        size = row.n_bits * (1 + SAME_SIZE) if is_chosen else row.n_bits
        return kept.n_bits <= size and _is_no_worse(kept, row) and not self.is_better(row, kept)


def _is_no_worse(kept: Candidate, row: Candidate) -> bool:
    """Whether a row is no worse than another in all further objectives; those must be known."""
    if kept.others is None or row.others is None:
        return False
    return all(a <= b for a, b in zip(kept.others, row.others, strict=True))


def _reason(candidate: Candidate, rival: Candidate, best: Candidate) -> str:
    """What speaks against a candidate."""
    size = "which is no larger"
    if rival.n_bits > candidate.n_bits:
        is_budget = candidate is best and rival.uniform is not None
        size = "which is within the budget" if is_budget else "which is of the same size"
    return f"not better beyond noise than {rival.label}, {size}"

"""The last comparison, on text that nothing before has seen: what of a search may be published?

Every point of the front and every uniform format is measured on the same held-out windows, so
their differences are paired. A point is published if its KL there is below that of every uniform
format of the menu of at most its bits; else that uniform format takes its place. So nothing that
is published is worse than uniform of the same size. The best point within the budget stands for
the budget: it is compared with all uniform formats within that, its own bits may be a few less.
Reference formats outside the menu are shown beside, and never published.

What was measured is kept in a log, so that a finished search is reported again without a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphaquant.evaluators.base import mean_and_stderr
from alphaquant.evaluators.data import TokenSet
from alphaquant.evaluators.divergence import Divergence
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.evaluations import EvaluationLog
from alphaquant.studies.intervals import Difference, compare_kl
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.storage import TrialRow
from alphaquant.studies.trials import is_uniform_loadable
from alphaquant.studies.winner import best_of

SEARCH = "search"


@dataclass(frozen=True)
class DomainScore:
    """One assignment on the held-out windows of one domain.

    Attributes:
        n_windows: of the domain.
        kl: nats per token.
        kl_stderr: its standard error over windows; None of a single window.
    """

    n_windows: int
    kl: float
    kl_stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """A row beside a uniform format.

    Attributes:
        name: of the format.
        bits_per_weight: stored bits per quantizable weight of the format.
        kl: of the format, nats per token.
        difference: KL of the format minus KL of the row, over all windows.
        domains: the same, by domain.
    """

    name: str
    bits_per_weight: float
    kl: float
    difference: Difference
    domains: Mapping[str, Difference]


@dataclass(frozen=True)
class HeldoutRow:
    """One assignment on the held-out text.

    Attributes:
        name: `trial-012`, or a format's name for what is uniform.
        trial: number of the front's point that this is; None for what is only compared with.
        digest: of the assignment.
        bits_per_weight: stored bits per quantizable weight.
        checkpoint_bytes: bytes of all tensors.
        kl: nats per token.
        kl_stderr: its standard error over windows.
        same_top: share of positions.
        perplexity: token perplexity.
        domains: KL by domain.
        rival: the other uniform format of at most its bits (the best: within the budget) with the
            lowest KL, references outside the menu included; None where there is none.
        replaced_by: the uniform format of the menu that is published in its place; None if none.
        is_within_budget: whether it may be `best.json`.
        is_published: whether it has a configuration.
        reason: why it is published or not.
    """

    name: str
    trial: int | None
    digest: str
    bits_per_weight: float
    checkpoint_bytes: int
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float
    domains: Mapping[str, DomainScore]
    rival: Comparison | None
    replaced_by: Comparison | None
    is_within_budget: bool
    is_published: bool
    reason: str


@dataclass(frozen=True)
class GateResult:
    """The decisions.

    Attributes:
        rows: all that was measured, by bits.
        best_name: name of the row with the search's best within the budget.
        winner: `SEARCH`, or the uniform format within the budget that is as good as it or better.
        published: the assignment of `best.json`.
    """

    rows: tuple[HeldoutRow, ...]
    best_name: str
    winner: str
    published: Assignment

    @property
    def best(self) -> HeldoutRow:
        """The search's best within the budget on the held-out text."""
        return self.row(self.best_name)

    @property
    def points(self) -> tuple[HeldoutRow, ...]:
        """What is published, by bits."""
        return tuple(row for row in self.rows if row.is_published)

    @property
    def withheld(self) -> tuple[HeldoutRow, ...]:
        """Points of the front in whose place a uniform format is published."""
        return tuple(row for row in self.rows if row.replaced_by is not None)

    def row(self, name: str) -> HeldoutRow:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class _Candidate:
    """A measured assignment.

    Attributes:
        assignment: of a point, of a uniform format, or of both.
        point: the trial whose point it is.
        uniform: name of its format where it has a single one.
        n_bits: stored bits.
        found: per window.
    """

    assignment: Assignment
    point: TrialRow | None
    uniform: str | None
    n_bits: int
    found: Divergence

    @property
    def name(self) -> str:
        if self.uniform is not None:
            return self.uniform
        assert self.point is not None, "what is not uniform is a point"
        return f"trial-{self.point.number:03d}"

    @property
    def kl(self) -> float:
        """The mean; infinite where the model broke down."""
        mean, _ = mean_and_stderr(self.found.kl)
        return math.inf if math.isnan(mean) else mean

    @property
    def order(self) -> tuple[float, int, str]:
        """Better ones first: by KL, then by bits, then by name."""
        return self.kl, self.n_bits, self.name


def judge(
    objective: Objective,
    heldout: EvaluationSet,
    space: SearchSpace,
    front: Sequence[tuple[TrialRow, Assignment]],
    names: Sequence[str],
    log: EvaluationLog | None = None,
) -> GateResult:
    """Measure every point and every uniform format on held-out text and decide.

    Args:
        objective: measures.
        heldout: the text.
        space: units, menu and budget.
        front: the points, of any size, with their assignments; at least one is within the budget.
        names: uniform formats to compare with; those that do not load for every unit are left out.
        log: what was measured before; None measures all.
    """
    points = {assignment.digest: (row, assignment) for row, assignment in front}
    uniforms = {
        assignment.digest: (name, assignment)
        for name in names
        if is_uniform_loadable(space, name)
        for assignment in (uniform_assignment(space.inventory, name),)
    }
    candidates = [
        _Candidate(
            assignment,
            points[digest][0] if digest in points else None,
            uniforms[digest][0] if digest in uniforms else None,
            assignment.storage_bits(space.inventory),
            _measure(objective, heldout, assignment, log),
        )
        for digest, (_, assignment) in {**points, **uniforms}.items()
    ]
    return _Decisions(space, heldout.tokens, candidates).result()


def _measure(
    objective: Objective,
    heldout: EvaluationSet,
    assignment: Assignment,
    log: EvaluationLog | None,
) -> Divergence:
    """One pass over the text, or what the log has; windows one by one, which scores lack."""
    known = None if log is None else log.get(assignment.digest)
    if known is not None:
        return known
    found = objective.divergence(assignment, heldout)
    if log is not None:
        log.add(assignment.digest, found)
    return found


@dataclass(frozen=True)
class _Decisions:
    """From measurements to what is published.

    Attributes:
        space: menu and budget.
        heldout: the text.
        candidates: points and uniform formats, each assignment once.
    """

    space: SearchSpace
    heldout: TokenSet
    candidates: Sequence[_Candidate]

    def result(self) -> GateResult:
        """The decisions."""
        best, winner = self._best(), self._winner()
        taken: dict[str, list[str]] = {} if winner is None else {winner.name: []}
        for candidate in self.candidates:
            taker = self._taker(candidate)
            if taker is not None:
                taken.setdefault(taker.name, []).append(candidate.name)
        ordered = sorted(self.candidates, key=lambda c: (c.n_bits, c.name))
        return GateResult(
            rows=tuple(self._row(c, taken.get(c.name)) for c in ordered),
            best_name=best.name,
            winner=SEARCH if winner is None else winner.name,
            published=(winner or best).assignment,
        )

    def _best(self) -> _Candidate:
        """The best point on the evaluation text within the budget."""
        within = {c.point.number: c for c in self.candidates if c.point and self._fits(c)}
        return within[best_of([c.point for c in within.values() if c.point]).number]

    def _winner(self) -> _Candidate | None:
        """The uniform format within the budget that is as good as the best or better."""
        lowest = self._lowest_uniform(self.space.limit_bits)
        return lowest if lowest is not None and not self._best().kl < lowest.kl else None

    def _taker(self, candidate: _Candidate) -> _Candidate | None:
        """The uniform format that is published in place of a point."""
        if candidate.point is None:
            return None
        lowest = self._lowest_uniform(self._size(candidate))
        if lowest is None or lowest is candidate or candidate.kl < lowest.kl:
            return None
        return lowest

    def _lowest_uniform(self, n_bits: int) -> _Candidate | None:
        """The best uniform format of the menu of at most so many bits."""
        menu = [c for c in self.candidates if c.uniform in self.space.menu and c.n_bits <= n_bits]
        return min(menu, key=lambda c: c.order, default=None)

    def _rival(self, candidate: _Candidate) -> _Candidate | None:
        """The best other uniform format, in the menu or not."""
        size = self._size(candidate)
        others = [
            c
            for c in self.candidates
            if c.uniform is not None and c.n_bits <= size and c is not candidate
        ]
        return min(others, key=lambda c: c.order, default=None)

    def _size(self, candidate: _Candidate) -> int:
        """Bits that a uniform format may have to be compared with a candidate."""
        return self.space.limit_bits if candidate is self._best() else candidate.n_bits

    def _fits(self, candidate: _Candidate) -> bool:
        return candidate.n_bits <= self.space.limit_bits

    def _row(self, candidate: _Candidate, replaces: list[str] | None) -> HeldoutRow:
        """The row of a candidate.

        Args:
            candidate: what was measured.
            replaces: points in whose place it is published, none for the winner alone; None for
                what is in no point's place.
        """
        taker = self._taker(candidate)
        kl, same_top, perplexity = candidate.found.scores(self.heldout.digest)
        rival = self._compare(candidate, self._rival(candidate))
        is_point = candidate.point is not None and taker is None
        counts = candidate.assignment.count_bits(self.space.inventory)
        assert kl.stderr is not None, "KL is a mean over windows"
        return HeldoutRow(
            name=candidate.name,
            trial=None if candidate.point is None else candidate.point.number,
            digest=candidate.assignment.digest,
            bits_per_weight=counts.bits_per_weight,
            checkpoint_bytes=counts.checkpoint_bytes,
            kl=kl.value,
            kl_stderr=kl.stderr,
            same_top=same_top.value,
            perplexity=perplexity.value,
            domains=self._domains(candidate),
            rival=rival,
            replaced_by=self._compare(candidate, taker),
            is_within_budget=self._fits(candidate),
            is_published=is_point or replaces is not None,
            reason=self._reason(candidate, rival, taker, replaces),
        )

    def _domains(self, candidate: _Candidate) -> dict[str, DomainScore]:
        scores = {}
        for name, inside in self._windows().items():
            kl, stderr = mean_and_stderr(candidate.found.kl[inside])
            n_windows = len(inside)
            scores[name] = DomainScore(n_windows, kl, stderr if n_windows > 1 else None)
        return scores

    def _compare(self, candidate: _Candidate, rival: _Candidate | None) -> Comparison | None:
        if rival is None:
            return None
        kl, other, domains = candidate.found.kl, rival.found.kl, self.heldout.domains
        return Comparison(
            rival.name,
            rival.n_bits / self.space.inventory.n_weights,
            rival.kl,
            compare_kl(kl, other, domains),
            {
                name: compare_kl(kl[inside], other[inside], [name] * len(inside))
                for name, inside in self._windows().items()
            },
        )

    def _windows(self) -> dict[str, list[int]]:
        """Windows by domain, in the order in which the domains were named."""
        found: dict[str, list[int]] = {}
        for window, name in enumerate(self.heldout.domains):
            found.setdefault(name, []).append(window)
        return found

    def _reason(
        self,
        candidate: _Candidate,
        rival: Comparison | None,
        taker: _Candidate | None,
        replaces: list[str] | None,
    ) -> str:
        """Why a candidate is published or not."""
        if taker is not None:
            return f"withheld: uniform {taker.name} is no larger and no worse"
        if replaces:
            return f"in the place of {', '.join(replaces)}"
        if candidate.point is None:
            only = "compared with only"
            return only if replaces is None else "as good as the best within the budget, or better"
        is_outside = rival is not None and rival.name not in self.space.menu
        if is_outside and rival is not None and rival.kl <= candidate.kl:
            return f"best of the menu; {rival.name}, which is not in it, is no worse"
        return "better than every other uniform format of the menu of at most its bits"

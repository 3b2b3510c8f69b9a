"""The last comparison, on text that nothing before has seen: what of a search may be published?

Every point of the front and every uniform format is measured on the same held-out windows, so
their differences are paired. What is published is decided by `alphaquant.studies.gate.rules`: a
point that is better beyond noise than every uniform format of at most its bits, and than every
smaller point. Reference formats outside the menu are shown beside, and never published.

What was measured is kept in a log, so that a finished search is reported again without a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphaquant.evaluators.base import Metric, mean_and_stderr
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.gate.intervals import Difference, compare_kl
from alphaquant.studies.gate.rules import Candidate, Rules, Verdicts
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.store.scores import EvaluationLog
from alphaquant.studies.store.study import TrialRow
from alphaquant.studies.trials import is_uniform_loadable
from alphaquant.texts.windows import TokenSet

SEARCH = "search"
_COMPARED = "compared with only"


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
        replaced_by: the row that is published in the place of this point; None if none.
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
        winner: `SEARCH`, or the uniform format within the budget that it is not better than.
        published: the assignment of `best.json`.
        first_name: name of the row that the evaluation text chose; another than `best_name` where
            that one is better than it, or than uniform, beyond noise on the held-out text.
    """

    rows: tuple[HeldoutRow, ...]
    best_name: str
    winner: str
    published: Assignment
    first_name: str

    @property
    def best(self) -> HeldoutRow:
        """The search's best within the budget on the held-out text."""
        return self.row(self.best_name)

    @property
    def points(self) -> tuple[HeldoutRow, ...]:
        """What is published, by bits."""
        return tuple(row for row in self.rows if row.is_published)

    def is_best(self, row: HeldoutRow) -> bool:
        """Whether a row is `best.json`."""
        return row.is_published and row.digest == self.published.digest

    @property
    def published_row(self) -> HeldoutRow:
        """The row of `best.json`."""
        return next(row for row in self.rows if self.is_best(row))

    @property
    def withheld(self) -> tuple[HeldoutRow, ...]:
        """Points of the front in whose place another row is published."""
        return tuple(row for row in self.rows if row.replaced_by is not None)

    def row(self, name: str) -> HeldoutRow:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)


def judge(
    objective: Objective,
    heldout: EvaluationSet,
    space: SearchSpace,
    front: Sequence[tuple[TrialRow, Assignment]],
    names: Sequence[str],
    log: EvaluationLog | None = None,
    *,
    objectives: Sequence[Metric] = (),
    progress: Progress = no_progress,
) -> GateResult:
    """Measure every point and every uniform format on held-out text, together, and decide.

    Args:
        objective: measures.
        heldout: the text.
        space: units, menu and budget.
        front: the points, of any size, with their assignments; at least one is within the budget.
        names: uniform formats to compare with; those that do not load for every unit are left out.
        log: what was measured before; None measures all.
        objectives: those of the study besides bits and KL, which every point's trial has.
        progress: called with ("gate", done, assignments): how much of their work is done.
    """
    points = {assignment.digest: row for row, assignment in front}
    uniforms = {
        assignment.digest: (name, assignment)
        for name in names
        if is_uniform_loadable(space, name)
        for assignment in (uniform_assignment(space.inventory, name),)
    }
    assignments = {assignment.digest: assignment for _, assignment in front}
    assignments |= {digest: assignment for digest, (_, assignment) in uniforms.items()}
    n_assignments = len(assignments)
    progress(Stage.GATE, 0, n_assignments)
    found = objective.divergences(
        list(assignments.values()),
        heldout,
        log,
        lambda done, total: progress(Stage.GATE, n_assignments * done // total, n_assignments),
    )
    progress(Stage.GATE, n_assignments, n_assignments)
    candidates = [
        Candidate(
            assignment,
            points.get(digest),
            uniforms[digest][0] if digest in uniforms else None,
            assignment.storage_bits(space.inventory),
            measured,
            _others(points.get(digest), objectives),
        )
        for (digest, assignment), measured in zip(assignments.items(), found, strict=True)
    ]
    return _Decisions(space, heldout.tokens, candidates).result()


def _others(row: TrialRow | None, objectives: Sequence[Metric]) -> tuple[float, ...] | None:
    """A point's further objectives, the less the better; None where it has no trial."""
    if row is None:
        return None if objectives else ()
    signs = [1 if metric.direction == "minimize" else -1 for metric in objectives]
    return tuple(s * row.score(m.name) for s, m in zip(signs, objectives, strict=True))


@dataclass(frozen=True)
class _Decisions:
    """From measurements to rows with what the rules say of them.

    Attributes:
        space: menu and budget.
        heldout: the text.
        candidates: points and uniform formats, each assignment once.
    """

    space: SearchSpace
    heldout: TokenSet
    candidates: Sequence[Candidate]

    @property
    def rules(self) -> Rules:
        """The rules over these candidates."""
        space = self.space
        return Rules(self.candidates, space.menu, space.limit_bits, self.heldout.domains)

    def result(self) -> GateResult:
        """The decisions."""
        verdicts = self.rules.verdicts()
        winner = verdicts.winner
        ordered = sorted(self.candidates, key=lambda c: (c.n_bits, c.name))
        return GateResult(
            rows=tuple(self._row(c, verdicts) for c in ordered),
            best_name=verdicts.best.name,
            winner=SEARCH if winner is None else winner.name,
            published=(winner or verdicts.best).assignment,
            first_name=verdicts.first.name,
        )

    def _row(self, candidate: Candidate, verdicts: Verdicts) -> HeldoutRow:
        """The row of a candidate."""
        kl, same_top, perplexity = candidate.found.scores(self.heldout.digest)
        rival = self._compare(candidate, self.rules.lowest_uniform(candidate, verdicts.best))
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
            replaced_by=self._compare(candidate, verdicts.takers.get(candidate.name)),
            is_within_budget=candidate.n_bits <= self.space.limit_bits,
            is_published=candidate.name in verdicts.published,
            reason=self._reason(candidate, rival, verdicts),
        )

    def _domains(self, candidate: Candidate) -> dict[str, DomainScore]:
        scores = {}
        for name, inside in self._windows().items():
            kl, stderr = mean_and_stderr(candidate.found.kl[inside])
            n_windows = len(inside)
            scores[name] = DomainScore(n_windows, kl, stderr if n_windows > 1 else None)
        return scores

    def _compare(self, candidate: Candidate, rival: Candidate | None) -> Comparison | None:
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

    def _reason(self, candidate: Candidate, rival: Comparison | None, verdicts: Verdicts) -> str:
        """Why a candidate is published or not."""
        if candidate.name in verdicts.reasons:
            return verdicts.reasons[candidate.name]
        replaced = verdicts.replaced_by(candidate.name)
        if candidate.uniform is not None and replaced:
            return f"in the place of {', '.join(replaced)}"
        if candidate.point is None:
            is_winner = candidate is verdicts.winner
            return "the best within the budget is not better" if is_winner else _COMPARED
        is_outside = rival is not None and rival.name not in self.space.menu
        if is_outside and rival is not None and rival.kl <= candidate.kl:
            return f"best of the menu; {rival.name}, which is not in it, is no worse"
        if candidate.uniform is not None:
            return "the best uniform format of the menu of at most its bits"
        return "better beyond noise than every uniform format of the menu of at most its bits"

"""The last comparison, on text that nothing before has seen: does the winner beat uniform formats?

All are measured on the same held-out windows, so their differences are paired. If a uniform format
of the menu within the budget has no higher KL there, uniform is the result, and the report says
so. Reference formats outside the menu are shown beside, and never published.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from alphaquant.evaluators.base import paired_difference
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.objective import EvaluationSet, Measured, Objective
from alphaquant.studies.storage import TrialRow
from alphaquant.studies.trials import UNIFORM, uniform_bits, uniform_fits

SEARCH = "search"
BEST = "best"
_N_BELOW, _N_ABOVE = 3, 1


@dataclass(frozen=True)
class HeldoutRow:
    """One assignment on the held-out text.

    Attributes:
        name: `best` (the search's winner) or a uniform format's name.
        digest: of the assignment.
        bits_per_weight: stored bits per quantizable weight.
        kl: nats per token.
        kl_stderr: its standard error over windows.
        same_top: share of positions.
        perplexity: token perplexity.
        difference: KL of this row minus KL of best, paired over windows.
        difference_stderr: its standard error.
    """

    name: str
    digest: str
    bits_per_weight: float
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float
    difference: float
    difference_stderr: float


@dataclass(frozen=True)
class GateResult:
    """The decision.

    Attributes:
        rows: best first, then uniform formats by bits.
        winner: `SEARCH`, or the uniform format that is as good or better.
        published: the assignment of `best.json`.
    """

    rows: tuple[HeldoutRow, ...]
    winner: str
    published: Assignment

    @property
    def best(self) -> HeldoutRow:
        """The search's winner on the held-out text."""
        return self.rows[0]


def uniform_rivals(
    space: SearchSpace, names: Sequence[str], rows: Sequence[TrialRow]
) -> tuple[str, ...]:
    """The uniform formats to compare with, by bits.

    Args:
        space: gives the budget.
        names: formats that are in the bank.
        rows: all trials.

    Returns:
        The three dearest within the budget, the cheapest above it, and the one of the lowest KL
        among the trials.
    """
    ordered = sorted(names, key=lambda n: (uniform_bits(space, n), n))
    limit = space.limit_bits / space.inventory.n_weights
    below = [n for n in ordered if uniform_fits(space, n)][-_N_BELOW:]
    above = [n for n in ordered if uniform_bits(space, n) > limit][:_N_ABOVE]
    trials = [r for r in rows if r.origin.startswith(UNIFORM)]
    lowest = [min(trials, key=lambda r: r.kl).origin.removeprefix(UNIFORM)] if trials else []
    return tuple(n for n in ordered if n in {*below, *above, *lowest})


def judge(
    objective: Objective,
    heldout: EvaluationSet,
    space: SearchSpace,
    best: Assignment,
    rivals: Sequence[str],
) -> GateResult:
    """Measure best and uniform on held-out text and decide.

    Args:
        objective: measures.
        heldout: the text.
        space: units, menu and budget.
        best: the winner on the evaluation text.
        rivals: uniform formats to compare with, see `uniform_rivals`.
    """
    measured = objective.measure(best, heldout)
    bits = best.storage_bits(space.inventory) / space.inventory.n_weights
    table = [_row(BEST, best, bits, measured, measured)]
    winner, published, lowest = SEARCH, best, table[0].kl
    for name in rivals:
        assignment = uniform_assignment(space.inventory, name)
        found = objective.measure(assignment, heldout)
        row = _row(name, assignment, uniform_bits(space, name), found, measured)
        table.append(row)
        is_candidate = name in space.menu and uniform_fits(space, name)
        if is_candidate and (row.kl < lowest or (winner == SEARCH and row.kl == lowest)):
            winner, published, lowest = name, assignment, row.kl
    return GateResult(tuple(table), winner, published)


def _row(
    name: str, assignment: Assignment, bits: float, found: Measured, best: Measured
) -> HeldoutRow:
    difference, stderr = paired_difference(found.kl, best.kl)
    return HeldoutRow(
        name=name,
        digest=assignment.digest,
        bits_per_weight=bits,
        kl=found.score("kl").value,
        kl_stderr=found.stderr("kl"),
        same_top=found.score("same_top").value,
        perplexity=found.score("perplexity").value,
        difference=difference,
        difference_stderr=stderr,
    )

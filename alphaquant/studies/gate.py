"""The last comparison, on text that nothing before has seen: is the winner better than uniform of at most its budget?

Both are measured on the same held-out windows, so their difference is paired. If the best uniform format within the budget has
the lower KL there, uniform is the result, and the report says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alphaquant.evaluators.base import paired_difference
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.folder import RunFolder
from alphaquant.studies.objective import EvaluationSet, Measured, Objective
from alphaquant.studies.storage import TrialRow
from alphaquant.studies.trials import uniform_fits


@dataclass(frozen=True)
class HeldoutRow:
    """One assignment on the held-out text.

    Attributes:
        name: `best` or `uniform int4-g64`.
        bits_per_weight: stored bits per quantizable weight.
        kl: nats per token, and its standard error.
        kl_stderr: see `kl`.
        same_top: share of positions.
        perplexity: token perplexity.
        difference: KL of this row minus KL of best, paired over windows, and its standard error.
        difference_stderr: see `difference`.
    """

    name: str
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
        winner: `search`, or the name of the uniform format that beat it.
        winner_digest: digest of the assignment that is published.
    """

    rows: tuple[HeldoutRow, ...]
    winner: str
    winner_digest: str


def uniform_neighbours(space: SearchSpace, names: Sequence[str]) -> list[str]:
    """The uniform formats to compare with: the two dearest within the budget, the cheapest above, and all of 4.25 bits beside it.

    Args:
        space: gives the budget.
        names: uniform formats that are in the bank.
    """
    bits = {n: space.inventory.storage_bits(parse_format(n)) for n in names}
    ordered = sorted(names, key=lambda n: (bits[n], n))
    below = [n for n in ordered if uniform_fits(space, n)]
    above = [n for n in ordered if bits[n] > space.limit_bits]
    return below[-3:] + above[:1]


def judge(
    objective: Objective,
    heldout: EvaluationSet,
    space: SearchSpace,
    folder: RunFolder,
    best: TrialRow,
    rows: Sequence[TrialRow],
    uniform_names: Sequence[str],
) -> GateResult:
    """Measure best and uniform on held-out text and decide.

    Args:
        objective: measures.
        heldout: the text.
        space: units and budget.
        folder: holds the evaluated assignments.
        best: the winner on the evaluation text.
        rows: all trials; the best uniform among them is always compared.
        uniform_names: formats of the bank.
    """
    measured = objective.measure(folder.load_assignment(best.digest), heldout)
    table = [_row("best", best.bits_per_weight, measured, measured)]
    uniform_rows = [r for r in rows if r.origin.startswith("uniform:")]
    names = uniform_neighbours(space, uniform_names)
    if uniform_rows:
        names.append(min(uniform_rows, key=lambda r: r.kl).origin.removeprefix("uniform:"))
    winner, winner_digest, lowest = "search", best.digest, float(measured.kl.mean())
    for name in sorted(set(names), key=lambda n: space.inventory.storage_bits(parse_format(n))):
        assignment = uniform_assignment(space.inventory, name)
        uniform = objective.measure(assignment, heldout)
        bits = space.inventory.storage_bits(parse_format(name)) / space.inventory.n_weights
        table.append(_row(f"uniform {name}", bits, uniform, measured))
        if uniform_fits(space, name) and float(uniform.kl.mean()) < lowest:
            winner, winner_digest, lowest = name, assignment.digest, float(uniform.kl.mean())
            folder.save_assignment(assignment)
    return GateResult(tuple(table), winner, winner_digest)


def _row(name: str, bits: float, measured: Measured, best: Measured) -> HeldoutRow:
    kl, top, perplexity = (measured.score(m) for m in ("kl", "same_top", "perplexity"))
    assert kl.stderr is not None
    difference = (0.0, 0.0) if torch.equal(measured.kl, best.kl) else paired_difference(measured.kl, best.kl)
    return HeldoutRow(name, bits, kl.value, kl.stderr, top.value, perplexity.value, *difference)


def scores_of(row: HeldoutRow) -> Mapping[str, float]:
    """The numbers that a configuration's summary carries."""
    return {"heldout_kl": row.kl, "heldout_kl_stderr": row.kl_stderr, "heldout_same_top": row.same_top}

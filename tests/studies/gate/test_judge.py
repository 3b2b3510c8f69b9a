"""The gate: nothing published is worse than uniform of its size, and what is withheld is said."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.evaluators.divergence import Divergence
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.studies.gate.judge import GateResult, judge
from alphaquant.studies.store.scores import EvaluationLog
from alphaquant.studies.store.study import TrialRow
from alphaquant.texts.windows import TokenSet

MATRICES = tuple(
    Matrix(f"model.layers.0.self_attn.{name}_proj", 64, 64, "attention", 0) for name in "qkvo"
)
INVENTORY = Inventory("tiny", MATRICES)
MENU = ("int2-g64", "int3-g64", "int4-g64", "int8-row")  # 2.25, 3.25, 4.25, 8.5 bits
DOMAINS = ("books", "books", "books", "code")

KL = {"int2-g64": 0.8, "int3-g64": 0.4, "int4-g64": 0.2, "int8-row": 0.01}
MIXES = {
    "low": ("int2-g64", "int2-g64", "int3-g64", "int3-g64"),  # 2.75 bits
    "mid": ("int3-g64", "int3-g64", "int4-g64", "int4-g64"),  # 3.75 bits
    "best": ("int2-g64", "int4-g64", "int4-g64", "int4-g64"),  # 3.75 bits
    "high": ("int4-g64", "int4-g64", "int8-row", "int8-row"),  # above 4.25
}


@dataclass
class FakeObjective:
    """An objective whose model is a table; windows are at 0.9, 1, 1 and 1.1 times the mean."""

    kl: Mapping[tuple[str, ...], float]
    n_evaluations: int = 0

    def divergences(
        self,
        assignments: Sequence[Assignment],
        on: Any,
        log: EvaluationLog | None,
        tell: Callable[[int, int], None],
    ) -> list[Divergence]:
        found = []
        for done, assignment in enumerate(assignments):
            known = None if log is None else log.get(assignment.digest)
            found.append(known or self.divergence(assignment, on))
            if log is not None and known is None:
                log.add(assignment.digest, found[-1])
            tell(done + 1, len(assignments))
        return found

    def divergence(self, assignment: Assignment, on: Any) -> Divergence:
        self.n_evaluations += 1
        n = len(on.tokens.domains)
        shape = torch.tensor([0.9, 1.0, 1.0, 1.1], dtype=torch.float64)[:n]
        same = torch.full((n,), 0.9)
        return Divergence(self.kl[tuple(assignment.formats.values())] * shape, same, same, 4, 0.0)


@dataclass
class FakeHeldout:
    """Windows without a teacher."""

    tokens: TokenSet
    teacher: None = None


def mix(name: str) -> Assignment:
    return Assignment(dict(zip((m.name for m in MATRICES), MIXES[name], strict=True)))


def heldout(domains: tuple[str, ...] = DOMAINS) -> Any:
    n = len(domains)
    return FakeHeldout(TokenSet("t", "heldout", torch.zeros(n, 4), n, 0, "digest", domains))


def space_of(budget: str, menu: tuple[str, ...] = MENU) -> SearchSpace:
    return make_space(INVENTORY, find_profile("any"), menu, parse_budget(budget))


def point(number: int, assignment: Assignment, kl: float) -> tuple[TrialRow, Assignment]:
    bits = assignment.storage_bits(INVENTORY) / INVENTORY.n_weights
    row = TrialRow(
        number, "knobs", assignment.digest, bits, 1, kl, 0.0, (), 0.9, 50.0, 0.0, None, 0.0
    )
    return row, assignment


@dataclass
class Gate:
    """Judges with the KL that a test wants."""

    objective: Any = None
    calls: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(
        self,
        kl: Mapping[str, float],
        mixes: tuple[str, ...] = ("best",),
        *,
        uniform_points: tuple[str, ...] = (),
        names: tuple[str, ...] = MENU,
        space: SearchSpace | None = None,
        log: EvaluationLog | None = None,
        domains: tuple[str, ...] = DOMAINS,
    ) -> GateResult:
        known: dict[tuple[str, ...], float] = {
            formats: kl[name] for name, formats in MIXES.items() if name in kl
        }
        known |= {(name,) * 4: value for name, value in kl.items() if name not in MIXES}
        self.objective = FakeObjective(known)
        assignments = [mix(name) for name in mixes]
        assignments += [uniform_assignment(INVENTORY, name) for name in uniform_points]
        # On the evaluation text a point is the better the more bits it has, as on a front.
        ordered = sorted(assignments, key=lambda a: a.storage_bits(INVENTORY))
        front = [point(i, a, 1.0 - 0.1 * i) for i, a in enumerate(ordered)]
        return judge(
            self.objective,
            heldout(domains),
            space or space_of("4.25bits"),
            front,
            names,
            log,
            progress=lambda *call: self.calls.append(call),
        )


@pytest.fixture
def decide() -> Gate:
    """Judge points with given KL."""
    return Gate()


def test_search_wins_when_it_is_better(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1})
    assert (gate.winner, gate.published) == ("search", mix("best"))
    assert gate.best.name == "trial-000"
    assert [row.name for row in gate.points] == ["trial-000"]
    assert [row.bits_per_weight for row in gate.rows] == sorted(
        row.bits_per_weight for row in gate.rows
    )


def test_best_is_compared_within_the_budget_and_the_difference_is_paired(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1})
    rival = gate.best.rival
    assert gate.best.bits_per_weight < 4.25
    assert rival is not None
    assert (rival.name, rival.bits_per_weight) == ("int4-g64", 4.25)
    assert rival.kl == pytest.approx(0.2)
    # Differences over windows are 0.09, 0.1, 0.1, 0.11: squares of 0.01 and 0.01 over 3 and 4.
    assert rival.difference.mean == pytest.approx(0.1)
    assert rival.difference.stderr == pytest.approx((0.0002 / 12) ** 0.5)
    assert rival.difference.low is not None and rival.difference.high is not None
    assert 0.09 < rival.difference.low < 0.1 < rival.difference.high < 0.11


def test_domains_are_compared_apart_and_a_domain_of_one_window_has_no_error(decide: Gate) -> None:
    best = decide({**KL, "best": 0.1}).best
    assert best.domains["books"].kl == pytest.approx(0.1 * 2.9 / 3)
    assert best.domains["code"].kl == pytest.approx(0.11)
    assert [d.n_windows for d in best.domains.values()] == [3, 1]
    assert best.domains["books"].kl_stderr is not None
    assert best.domains["code"].kl_stderr is None
    assert best.rival is not None
    assert best.rival.domains["books"].mean == pytest.approx(0.2 * 2.9 / 3 - 0.1 * 2.9 / 3)
    code = best.rival.domains["code"]
    assert code.mean == pytest.approx(0.11)
    assert (code.stderr, code.low) == (None, None)


def test_one_domain_has_the_numbers_of_the_whole(decide: Gate) -> None:
    best = decide({**KL, "best": 0.1}, domains=("books",) * 4).best
    assert best.rival is not None
    assert best.domains["books"].kl == pytest.approx(best.kl)
    assert best.rival.domains["books"] == best.rival.difference


def test_uniform_wins_at_one_size_only(decide: Gate) -> None:
    gate = decide({**KL, "low": 0.9, "best": 0.1}, ("low", "best"))
    assert gate.winner == "search"
    assert [row.name for row in gate.points] == ["int2-g64", "trial-001"]
    (withheld,) = gate.withheld
    assert withheld.name == "trial-000" and not withheld.is_published
    assert withheld.replaced_by is not None
    assert withheld.replaced_by.name == "int2-g64"
    assert withheld.replaced_by.difference.mean == pytest.approx(-0.1)
    assert withheld.reason == (
        "withheld: not better beyond noise than uniform int2-g64, which is no larger"
    )
    assert gate.row("int2-g64").reason == "in the place of trial-000"
    assert gate.row("int2-g64").trial is None


def test_uniform_wins_when_the_search_is_worse(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.3})
    assert gate.winner == "int4-g64"
    assert gate.published == uniform_assignment(INVENTORY, "int4-g64")
    assert [row.name for row in gate.points] == ["int4-g64"]
    assert [row.name for row in gate.withheld] == ["trial-000"]


def test_uniform_wins_a_tie_and_the_smallest_of_equal_ones_counts(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.2, "int3-g64": 0.2})
    assert gate.winner == "int3-g64"
    assert [row.name for row in gate.points] == ["int3-g64"]


def test_uniform_point_is_measured_once_and_published_as_itself(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1}, uniform_points=("int2-g64",))
    assert decide.objective.n_evaluations == 5
    row = gate.row("int2-g64")
    assert (row.trial, row.is_published, row.rival) == (0, True, None)


def test_uniform_point_that_is_the_best_is_named_as_uniform(decide: Gate) -> None:
    gate = decide(KL, (), uniform_points=("int2-g64", "int4-g64"))
    assert (gate.winner, gate.best_name) == ("int4-g64", "int4-g64")
    assert gate.best.replaced_by is None
    assert [row.trial for row in gate.points] == [0, 1]


def test_uniform_point_that_a_smaller_one_beats_is_withheld(decide: Gate) -> None:
    kl = {**KL, "int3-g64": 0.1}
    gate = decide(kl, (), uniform_points=("int3-g64", "int4-g64"))
    assert gate.winner == "int3-g64"
    assert [row.name for row in gate.points] == ["int3-g64"]
    assert [row.name for row in gate.withheld] == ["int4-g64"]


def test_point_above_the_budget_is_published_beside_uniform_of_its_size(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1, "high": 0.05}, ("best", "high"))
    high = gate.row("trial-001")
    assert high.is_published and not high.is_within_budget
    assert high.bits_per_weight > 4.25
    assert high.rival is not None and high.rival.name == "int4-g64"
    assert gate.best.name == "trial-000"
    assert gate.published == mix("best")


def test_point_above_the_budget_is_withheld_where_uniform_is_better(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1, "high": 0.25}, ("best", "high"))
    assert [row.name for row in gate.withheld] == ["trial-001"]
    assert gate.winner == "search"
    # int4-g64 would be in its place, but the best is smaller than that and better.
    assert [row.name for row in gate.points] == ["trial-000"]
    (withheld,) = gate.withheld
    assert withheld.replaced_by is not None and withheld.replaced_by.name == "trial-000"
    assert gate.row("int4-g64").reason == (
        "not better beyond noise than trial-000, which is no larger"
    )


def test_uniform_over_the_budget_never_wins(decide: Gate) -> None:
    gate = decide({**KL, "best": 0.1, "int8-row": 0.001})
    assert gate.winner == "search"
    row = gate.row("int8-row")
    assert not row.is_published and not row.is_within_budget
    assert row.reason == "compared with only"


def test_reference_outside_the_menu_is_shown_and_never_published(decide: Gate) -> None:
    kl = {"int2-g64": 0.8, "int4-g64": 0.4, "mxfp4": 0.01, "best": 0.3}
    space = space_of("4.25bits", ("int2-g64", "int4-g64"))
    gate = decide(kl, names=("int2-g64", "int4-g64", "mxfp4"), space=space)
    assert gate.winner == "search"
    assert gate.best.is_published
    assert gate.best.rival is not None and gate.best.rival.name == "mxfp4"
    assert gate.best.reason == "best of the menu; mxfp4, which is not in it, is no worse"
    assert not gate.row("mxfp4").is_published


def test_budget_below_every_uniform_format_leaves_no_rival(decide: Gate) -> None:
    kl = {"int3-g64": 0.4, "int4-g64": 0.2, "low": 0.5}
    gate = decide(kl, ("low",), names=("int3-g64", "int4-g64"), space=space_of("3bits"))
    assert (gate.winner, gate.best.rival) == ("search", None)
    assert gate.best.is_published


def test_model_that_breaks_down_is_not_published(decide: Gate) -> None:
    gate = decide({**KL, "best": float("nan")})
    assert gate.winner == "int4-g64"
    assert [row.name for row in gate.points] == ["int4-g64"]
    broken = decide({**KL, "int2-g64": float("nan"), "best": 0.1})
    assert broken.best.rival is not None and broken.best.rival.name == "int4-g64"


def test_every_assignment_is_a_step_of_the_comparison(decide: Gate) -> None:
    decide({**KL, "best": 0.1})
    assert list(dict.fromkeys(decide.calls)) == [("gate", n, 5) for n in range(6)]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_published_is_worse_than_uniform_of_at_most_its_size(
    seed: int, decide: Gate
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = (*MENU, *MIXES)
    values = (torch.randint(1, 6, (len(names),), generator=generator) / 10).tolist()
    gate = decide(
        dict(zip(names, values, strict=True)),
        ("low", "best", "high"),
        uniform_points=("int2-g64", "int3-g64"),
    )
    for row in gate.points:
        smaller = [
            o for o in gate.rows if o.name in MENU and o.bits_per_weight <= row.bits_per_weight
        ]
        assert all(row.kl <= other.kl for other in smaller)
        # A tie goes to uniform.
        assert row.name in MENU or all(row.kl < other.kl for other in smaller)
    for row in gate.points:
        smaller = [o for o in gate.points if o.bits_per_weight <= row.bits_per_weight]
        is_best = row.digest == gate.published.digest
        assert all(row.kl <= o.kl if is_best else row.kl < o.kl for o in smaller if o is not row)
    for row in gate.withheld:
        assert row.replaced_by is not None
        assert gate.row(row.replaced_by.name).is_published
    within = [r for r in gate.rows if r.name in MENU and r.is_within_budget]
    published = next(r for r in gate.rows if r.digest == gate.published.digest)
    assert published.is_published and published.is_within_budget
    assert all(published.kl <= row.kl for row in within)
    points = {r.name for r in gate.rows if r.trial is not None}
    assert points == {r.name for r in gate.points if r.trial is not None} | {
        r.name for r in gate.withheld
    }


def test_what_was_measured_is_not_measured_again(decide: Gate, tmp_path: Path) -> None:
    kl = {**KL, "best": 0.1}
    path = tmp_path / "heldout.jsonl"
    first = decide(kl, log=EvaluationLog(path, 4))
    assert decide.objective.n_evaluations == 5
    again = decide(kl, log=EvaluationLog(path, 4))
    assert decide.objective.n_evaluations == 0
    assert [row.name for row in again.points] == [row.name for row in first.points]
    assert again.best.kl == pytest.approx(first.best.kl)

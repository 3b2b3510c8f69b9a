"""The gate: rivals by bits, uniform wins ties and better, formats outside the menu never win."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from alphaquant.evaluators.base import Score
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.studies.gate import judge, uniform_rivals
from alphaquant.studies.objective import Measured
from alphaquant.studies.storage import TrialRow

MATRICES = tuple(
    Matrix(f"model.layers.0.self_attn.{name}_proj", 64, 64, "attention", 0) for name in "qkvo"
)
INVENTORY = Inventory("tiny", MATRICES)
MENU = ("int2-g64", "int3-g64", "int4-g64", "int8-row")
BEST = Assignment(
    {m.name: n for m, n in zip(MATRICES, ("int2-g64", *["int4-g64"] * 3), strict=True)}
)


@dataclass
class FakeObjective:
    """Gives assignments the KL that a test wants, the same in both windows up to 10 %."""

    kl: Mapping[str, float]

    def measure(self, assignment: Assignment, on: object) -> Measured:
        names = set(assignment.formats.values())
        kl = self.kl[names.pop() if len(names) == 1 else "best"]
        per_window = torch.tensor([0.9 * kl, 1.1 * kl], dtype=torch.float64)

        def score(metric: str, value: float) -> Score:
            return Score(metric, value, "u", "minimize", 0.1 * value, 2, 8, 0.0, "x")

        return Measured(
            (score("kl", kl), score("same_top", 0.9), score("perplexity", 50.0)), per_window
        )


def space_of(budget: str, menu: tuple[str, ...] = MENU) -> SearchSpace:
    return make_space(INVENTORY, find_profile("any"), menu, parse_budget(budget))


def decide(kl: Mapping[str, float], menu: tuple[str, ...] = MENU) -> Any:
    objective: Any = FakeObjective(kl)
    heldout: Any = None
    rivals = [n for n in kl if n != "best"]
    return judge(objective, heldout, space_of("4.25bits", menu), BEST, rivals)


def test_search_wins_when_it_is_better() -> None:
    gate = decide({"best": 0.1, "int3-g64": 0.4, "int4-g64": 0.2})
    assert (gate.winner, gate.published) == ("search", BEST)
    assert [row.name for row in gate.rows] == ["best", "int3-g64", "int4-g64"]
    assert gate.best.difference == 0
    assert gate.rows[2].difference == pytest.approx(0.1)
    # The differences over windows are 0.09 and 0.11: their mean has an error of 0.01.
    assert gate.rows[2].difference_stderr == pytest.approx(0.01)


def test_uniform_wins_when_the_search_is_worse() -> None:
    gate = decide({"best": 0.3, "int3-g64": 0.25, "int4-g64": 0.2})
    assert gate.winner == "int4-g64"
    assert gate.published == uniform_assignment(INVENTORY, "int4-g64")


def test_uniform_wins_a_tie_and_the_first_of_equal_ones_counts() -> None:
    assert decide({"best": 0.2, "int3-g64": 0.2, "int4-g64": 0.2}).winner == "int3-g64"


def test_uniform_over_the_budget_is_shown_and_never_wins() -> None:
    gate = decide({"best": 0.3, "int8-row": 0.01})
    assert gate.winner == "search"
    assert gate.rows[1].name == "int8-row"


def test_uniform_outside_the_menu_is_shown_and_never_wins() -> None:
    gate = decide({"best": 0.3, "mxfp4": 0.01}, menu=("int2-g64", "int4-g64"))
    assert gate.winner == "search"
    assert gate.rows[1].bits_per_weight == 4.25


def row(origin: str, kl: float) -> TrialRow:
    return TrialRow(0, origin, "d", 4.0, 1, kl, 0.0, (), 0.9, 50.0, 0.0, None, 0.0)


def test_rivals_are_three_below_one_above_and_the_best_uniform_trial() -> None:
    names = ("int8-row", "int2-g64", "int3-g64", "int4-g64", "mxfp4", "bf16")
    rows = [row("uniform:int2-g64", 0.1), row("uniform:int3-g64", 0.2), row("knobs", 0.05)]
    rivals = uniform_rivals(space_of("4.25bits"), names, rows)
    assert rivals == ("int2-g64", "int3-g64", "int4-g64", "mxfp4", "int8-row")
    better = [replace(rows[0], kl=0.3), *rows[1:]]
    assert "int2-g64" not in uniform_rivals(space_of("4.25bits"), names, better)


def test_a_budget_below_every_uniform_format_leaves_the_cheapest_above() -> None:
    space = space_of("2.3bits", ("int2-g64", "int4-g64"))
    assert uniform_rivals(space, ("int3-g64", "int4-g64"), []) == ("int3-g64",)

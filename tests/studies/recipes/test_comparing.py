"""The study of recipes with a bench whose divergences are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.evaluators.divergence import Divergence
from alphaquant.progress import StageClock, no_progress
from alphaquant.spaces.assignment import BitCount
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.objective import Measured
from alphaquant.studies.recipes.choices import Choice, Recipe
from alphaquant.studies.recipes.comparing import RecipeFindings, RecipeStudy, surest
from alphaquant.studies.store.study import make_row, open_study

OWN = Recipe(QuantSettings(), "demo")
ROUTED = Inventory("olmoe", (Matrix("a.experts.0.down_proj", 8, 8, "expert", 0, expert=0),))
WINDOWS = torch.linspace(0.9, 1.1, 6)
COUNTS = BitCount(4.0, 4.0, 4.0, 64, 64)


@dataclass
class Bench:
    """Stands for a model: KL by recipe, and how often each was quantized."""

    kl_of: Callable[[Recipe], float]
    own: Recipe = OWN
    seen: list[Recipe] = field(default_factory=list)

    def usable(self, choices: Sequence[Choice], seed: int) -> tuple[list[Choice], dict[str, str]]:
        kept = [c for c in choices if c.name in ("percdamp", "shrinkage")]
        return kept, {"rotate": "it is a test"}

    def source(self, rotate: int | None) -> Any:
        return SimpleNamespace(map=SimpleNamespace(inventory=ROUTED), digest="weights")

    def text(self, recipe: Recipe) -> Any:
        return SimpleNamespace(provenance=lambda: {"source": recipe.calibration})

    def counts(self, recipe: Recipe) -> BitCount:
        return COUNTS

    def divergence(self, recipe: Recipe, on: Any, progress: Any = no_progress) -> Divergence:
        self.seen.append(recipe)
        return divergence(self.kl_of(recipe) * on.windows)


def divergence(kl: Tensor) -> Divergence:
    return Divergence(kl, torch.full_like(kl, 0.5), torch.ones_like(kl), 16, 0.1)


def measured(found: Divergence) -> Measured:
    return Measured(tuple(found.scores("text")), found.kl)


def text_of(windows: Tensor) -> Any:
    tokens = SimpleNamespace(digest="text", domains=("demo",) * len(windows))
    return SimpleNamespace(tokens=tokens, windows=windows)


def study_of(folder: Path, bench: Bench, n_trials: int, **changes: Any) -> RecipeFindings:
    heldout = changes.pop("heldout", WINDOWS)
    with open_study(f"sqlite:///{folder}/study.db", "recipes", "facts") as study:
        given: Any = {
            **{"study": study, "bench": bench, "sampler": "tpe", "seed": 0},
            **{"own": lambda on: divergence(bench.kl_of(OWN) * on.windows)},
            **{"n_trials": n_trials, "is_late": lambda: False, "clock": StageClock(no_progress)},
        }
        return RecipeStudy(**given | changes).run(text_of(WINDOWS), text_of(heldout))


def damped(recipe: Recipe) -> float:
    """Less KL with more damping; the other choice does nothing."""
    return 0.5 - recipe.settings.percdamp


def test_options_come_alone_then_a_samplers_and_the_best_is_compared(tmp_path: Path) -> None:
    bench = Bench(damped)
    found = study_of(tmp_path, bench, 15)
    assert [e.option for e in found.effects[:4]] == [0.003, 0.03, 0.1, False]
    first = found.effects[0]
    assert first.difference == pytest.approx(-0.007)
    assert found.params[found.best]["percdamp"] == 0.1
    assert found.is_better and found.served is not None and found.difference is not None
    assert found.served.kl == pytest.approx(0.4)
    assert found.difference.mean == pytest.approx(0.09)
    assert found.left_out == {"rotate": "it is a test"}
    assert len(found.importances) == 2
    assert max(found.importances, key=lambda n: found.importances[n]) == "percdamp"
    assert OWN not in bench.seen[:-1], "the search measured its own recipe"


def test_trials_of_an_earlier_run_are_handed_back_and_more_go_on(tmp_path: Path) -> None:
    first = study_of(tmp_path, Bench(damped), 8)
    bench = Bench(damped)
    again = study_of(tmp_path, bench, 8)
    assert again == first
    assert len(bench.seen) == 1, "the held-out text only"
    (tmp_path / "whole").mkdir()
    whole = study_of(tmp_path / "whole", Bench(damped), 10)
    longer = study_of(tmp_path, Bench(damped), 10)
    assert [r.digest for r in longer.rows] == [r.digest for r in whole.rows]


def test_nothing_is_better_where_all_are_equal_or_where_other_text_disagrees(
    tmp_path: Path,
) -> None:
    found = study_of(tmp_path, Bench(lambda recipe: 0.5), 6)
    assert found.best == 0 and found.served is None and not found.is_better
    assert found.importances == {}
    (tmp_path / "other").mkdir()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # the gain is noise there
    other = study_of(tmp_path / "other", Bench(damped), 6, heldout=signs)
    assert other.served is not None and not other.is_better


def test_a_recipe_that_cannot_quantize_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    def kl_of(recipe: Recipe) -> float:
        if recipe.settings.percdamp == 0.003:
            raise ModelError("the Hessian of a cannot be factorized")
        return damped(recipe)

    found = study_of(tmp_path, Bench(kl_of), 6)
    assert found.problems == {1: "the Hessian of a cannot be factorized"}
    assert found.effects[0].kl is None
    assert found.params[found.best]["percdamp"] == 0.1
    assert study_of(tmp_path, Bench(kl_of), 6) == found


def test_the_surest_gain_is_taken_not_the_lowest_mean(tmp_path: Path) -> None:
    kl = {0: [1.0] * 6, 1: [0.95, 0.94, 0.95, 0.94, 0.95, 0.96], 2: [0.1, *[1.02] * 5]}
    rows = [
        make_row(n, "recipe", str(n), COUNTS, measured(divergence(torch.tensor(values))))
        for n, values in kl.items()
    ]
    assert surest(rows).number == 1  # the third has the lowest mean, by one window
    assert surest([rows[0], rows[2]]).number == 0


def test_no_trial_starts_when_the_time_is_over_but_the_first(tmp_path: Path) -> None:
    found = study_of(tmp_path, Bench(damped), 6, is_late=lambda: True)
    assert len(found.rows) == 1 and found.stopped == "the time is over"


def test_choices_that_no_trial_comes_to_are_told(tmp_path: Path) -> None:
    found = study_of(tmp_path, Bench(damped), 8)
    assert [c.name for c in found.choices] == ["percdamp", "shrinkage"]
    assert found.left_out["route_exponent"] == "8 trials do not come to it"

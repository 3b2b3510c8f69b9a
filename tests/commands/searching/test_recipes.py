"""Recipes behind a search, for real: measured, taken up again, and quantized as they say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import plan_search, search
from alphaquant.errors import ConfigError
from alphaquant.progress import Stage
from alphaquant.quant.sequential import banked
from alphaquant.spaces.config import load_config
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.recipes import comparing, measuring
from alphaquant.studies.recipes.choices import ROTATE, Choice
from alphaquant.studies.recipes.comparing import RecipeFindings
from alphaquant.studies.recipes.measuring import RecipeBench
from alphaquant.testing.checkpoints import save_tiny

MakeSpec = Callable[..., SearchSpec]


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> SearchSpec:
    return make_spec(tmp_path / "out", trials=3, recipes=3, percdamp=0.5, two_sided=False)


def kl_of(packed: Path, model: str, texts: dict[str, Path]) -> float:
    given: dict[str, Any] = {"data": str(texts["heldout"]), "samples": 6, "seq_len": 48}
    measured = evaluate(EvaluateSpec(model=str(packed), reference=model, **given))
    return next(s.value for s in measured.scores if s.metric == "kl")


def test_recipe_json_quantizes_to_what_the_search_measured_of_it(
    spec: SearchSpec, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "surest", lambda rows: rows[1])
    monkeypatch.setattr(RecipeFindings, "is_better", True)
    told: list[tuple[str, int, int]] = []
    result = search(spec, progress=lambda *a: told.append(a))
    found, file = result.recipes, spec.run.out / "recipe.json"
    assert found is not None and found.served is not None
    assert ("recipes", 400, 400) in told
    summary = load_config(file).summary or {}
    assert summary["quantization"]["percdamp"] == 0.5
    assert summary["quantization"]["sequential"] is found.served.recipe.settings.sequential is True
    front = json.loads((spec.run.out / "front.json").read_text())
    assert front["recipes"]["config"] == "recipe.json"
    for name in ("report.md", "report.html"):
        text = (spec.run.out / name).read_text()
        assert "Recipes of best.json" in text and "out/recipe.json" in text
    assert not (spec.run.cache or tmp_path).joinpath("recipes").exists()
    model = spec.checkpoint.model
    quantize(QuantizeSpec.of(model=model, config=file, out=tmp_path / "packed"))
    assert kl_of(tmp_path / "packed", model, texts) == pytest.approx(found.served.kl, abs=1e-6)
    # Another run without recipes keeps the file, and one that finds nothing better removes it.
    search(replaced(spec, recipes=0))
    assert file.exists()
    monkeypatch.setattr(RecipeFindings, "is_better", False)
    n_measured = 0
    divergence = RecipeBench.divergence

    def counted(own: RecipeBench, *args: Any) -> Any:
        nonlocal n_measured
        n_measured += 1
        return divergence(own, *args)

    monkeypatch.setattr(RecipeBench, "divergence", counted)
    again = search(spec)
    assert n_measured == 1, "only the held-out text, trials are in the study"
    assert again.recipes is not None and again.recipes.rows == found.rows
    assert not file.exists()


def test_a_rotated_recipe_is_quantized_rotated(
    make_spec: MakeSpec,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "choices_of", lambda *a: (Choice(ROTATE, (False, True)),))
    monkeypatch.setattr(comparing, "surest", lambda rows: rows[1])
    monkeypatch.setattr(RecipeFindings, "is_better", True)
    model = str(save_tiny(tmp_path / "untied", tie_word_embeddings=False))
    result = search(make_spec(tmp_path / "out", model=model, trials=2, recipes=2, method="gptq"))
    found = result.recipes
    assert found is not None and found.served is not None
    assert found.served.recipe.rotate == 0 and found.left_out == {}
    file = tmp_path / "out" / "recipe.json"
    summary = load_config(file).summary or {}
    grown = summary["checkpoint_bytes"] - result.counts.checkpoint_bytes
    assert 0 < grown < 0.02 * result.counts.checkpoint_bytes, "routers in float32"
    quantize(QuantizeSpec.of(model=model, config=file, out=tmp_path / "packed"))
    assert kl_of(tmp_path / "packed", model, texts) == pytest.approx(found.served.kl, abs=1e-6)


def test_a_recipe_that_was_stopped_goes_on_with_what_was_rounded(
    spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    asked = replaced(spec, recipes=2)
    assert asked.run.cache is not None
    left = asked.run.cache / "recipes"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measuring.Objective, "divergence", stop)
        search(asked)
    assert (spec.run.out / "best.json").exists() and list(left.rglob("*.safetensors"))
    monkeypatch.setattr(banked, "write_items", stop)  # every layer was rounded before
    found = search(asked).recipes
    assert found is not None and [row.is_pruned for row in found.rows] == [False, False]
    assert not left.exists()


def test_a_plan_reckons_with_recipes(spec: SearchSpec) -> None:
    stages = {s.stage: s for s in plan_search(spec).stages}
    assert stages[Stage.RECIPES].seconds > 0 and stages[Stage.RECIPES].disk > 0
    assert Stage.RECIPES not in {s.stage for s in plan_search(replaced(spec, recipes=0)).stages}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "rtn"}, "--recipes 3 with --method rtn, which has nothing to choose"),
        (
            {"candidates": "a,b", "formats": "auto"},
            "--recipes 3 with --candidates: others quantized those",
        ),
    ],
)
def test_recipes_of_what_nobody_rounds_here_are_refused(
    spec: SearchSpec, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        search(replaced(spec, **changes))

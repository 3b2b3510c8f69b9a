"""Evaluations of assignments: the original has no divergence, and every run counts."""

from pathlib import Path

import pytest

from alphaquant.evaluators.divergence import store_teacher
from alphaquant.quant.bank import fill_bank, open_bank
from alphaquant.quant.engine import QuantSettings
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.sources import Source, load_source, read_text


@pytest.fixture
def source(tiny: Path) -> Source:
    return load_source(str(tiny), "cpu", "auto")


@pytest.fixture
def evaluation(source: Source, texts: dict[str, Path], tmp_path: Path) -> EvaluationSet:
    tokens = read_text(source, str(texts["search"]), "search", 4, 32, 0)
    return EvaluationSet(
        tokens, store_teacher(tmp_path / "t.safetensors", source.map.model, tokens.tokens)
    )


def test_measurement_depends_on_the_assignment_and_not_on_the_one_before(
    source: Source, evaluation: EvaluationSet, tmp_path: Path
) -> None:
    bank = open_bank(tmp_path, "key", source.map.inventory, {})
    names = ("int2-g32", "bf16")
    fill_bank(bank, source.map, evaluation.tokens.tokens, names, QuantSettings(method="rtn"))
    objective = Objective(Swapper(source.map, bank.read))
    coarse, exact = (uniform_assignment(source.map.inventory, name) for name in names)
    first = objective.measure(coarse, evaluation)
    original = objective.measure(exact, evaluation)
    again = objective.measure(coarse, evaluation)
    # The weights are bfloat16 numbers, so bf16 is the original.
    assert original.score("kl").value == pytest.approx(0.0, abs=1e-9)
    assert first.score("kl").value > 1e-4
    assert first.stderr("kl") > 0
    assert first.kl.tolist() == again.kl.tolist()
    assert first.score("kl").value == pytest.approx(float(first.kl.mean()), rel=1e-6)
    assert objective.n_evaluations == 3

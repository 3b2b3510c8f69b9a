"""The benchmark of expert sensitivity: its pieces on a tiny model and on made-up rows."""

import json
from types import ModuleType
from typing import Any

import pytest
import torch

from alphaquant.commands.sensitivity import (
    FoundSensitivity,
    measure_expert_sensitivity,
)
from alphaquant.costs.experts import VIEWS, expert_units
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.studies.inputs import read_text
from alphaquant.studies.objective import EvaluationSet
from alphaquant.testing.checkpoints import save_texts, save_tiny
from tests.benches import FOLDER, import_benchmark


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_benchmark("expert_sensitivity")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FoundSensitivity:
    folder = tmp_path_factory.mktemp("found")
    texts = save_texts(folder)
    spec = SensitivitySpec.of(
        format="int2-g32",
        model=str(save_tiny(folder / "tiny", num_experts=8)),
        calibration=str(texts["calibration"]),
        calibration_samples=4,
        seq_len=32,
        cache=folder / "cache",
    )
    return measure_expert_sensitivity(spec)


@pytest.fixture(scope="module")
def on(found: FoundSensitivity, tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    folder = tmp_path_factory.mktemp("heldout")
    tokens = read_text(found.source, str(save_texts(folder)["heldout"]), "heldout", 4, 32, 0)
    teacher = store_teacher(folder / "t.safetensors", found.source.map.model, tokens.tokens)
    return EvaluationSet(tokens, teacher)


def test_weights_are_swapped_in_and_put_back_bit_for_bit(
    bench: ModuleType, found: FoundSensitivity
) -> None:
    model_map = found.source.map
    unit = expert_units(model_map.inventory)[3]
    before = {name: view.clone() for name, view in model_map.views.items()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        bench.swapped(model_map, found.bank, unit.matrices, "int2-g32"),
    ):
        changed = {n for n, view in model_map.views.items() if not torch.equal(view, before[n])}
        assert changed == {m.name for m in unit.matrices}
        first = unit.matrices[0]
        expected = found.bank.read(first, "int2-g32").dequantize()
        assert torch.equal(model_map.view(first.name), expected)
        raise RuntimeError("stop")
    assert all(torch.equal(view, before[name]) for name, view in model_map.views.items())


def test_rows_have_a_true_divergence_and_the_original_has_none(
    bench: ModuleType, found: FoundSensitivity, on: EvaluationSet
) -> None:
    result = bench.compared(found, on, 12, 0)
    rows, total = result["experts"], result["additivity"]
    assert len(rows) == 12
    assert [r["rank"] for r in rows] == sorted(r["rank"] for r in rows)
    assert all(r["kl"] > 0 for r in rows if r["n_tokens"])
    assert result["kl_of_the_original"] == 0.0
    assert result["spearman"]["sample"]["n"] == 12
    assert total["kl_together"] > max(r["kl"] for r in rows)
    assert total["sum_of_kl"] == sum(r["kl"] for r in rows)


def test_both_ends_are_chosen_and_the_rest_is_drawn(
    bench: ModuleType, found: FoundSensitivity
) -> None:
    experts = found.sensitivity.experts
    assert len(experts) == 16
    ends = [*experts[:5], *experts[-5:]]
    assert bench.chosen_experts(experts, 0, 0) == ends
    some = bench.chosen_experts(experts, 13, 0)
    assert len(some) == 13
    assert set(ends) < set(some)
    assert some == bench.chosen_experts(experts, 13, 0)
    assert bench.chosen_experts(experts, 99, 0) == list(experts)


def row(rank: int, kl: float, **changes: Any) -> dict[str, Any]:
    """A made-up expert whose views are all its KL."""
    views = dict.fromkeys(VIEWS, kl)
    return {"rank": rank, "layer": rank % 2, "n_tokens": 10 * rank, "kl": kl, **views, **changes}


def test_correlations_are_of_ranks_and_leave_unseen_experts_out(bench: ModuleType) -> None:
    rows = [row(i, float(i), fisher=2.0**i, use=-float(i)) for i in range(1, 6)]
    rows[0]["fragility"] = None
    rows[1]["error"] = 9.0
    found = bench.correlations(rows)
    assert [found[view] for view in ("fisher", "use", "fragility")] == pytest.approx([1, -1, 1])
    # Ranks 1, 5, 2, 3, 4: 1 - 6 * (0 + 9 + 1 + 1 + 1) / (5 * 24).
    assert found["error"] == pytest.approx(0.4)
    assert bench.correlations(rows[:2])["fisher"] is None
    assert bench.correlations(rows[:3])["fragility"] is None
    assert bench.correlations([row(i, 1.0, use=float(i)) for i in range(3)])["use"] is None


def test_groups_are_ends_sample_well_seen_and_layers(bench: ModuleType) -> None:
    rows = [row(i, float(i)) for i in range(1, 13)]
    groups = {name: [r["rank"] for r in g] for name, g in bench.groups_of(rows, 12).items()}
    assert groups["five most and five least"] == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    assert groups["sample"] == list(range(1, 13))
    assert groups["sample, seen by 64 tokens or more"] == [7, 8, 9, 10, 11, 12]
    assert groups["layer 1"] == [1, 3, 5, 7, 9, 11]


def test_markdown_shows_ends_and_correlations(bench: ModuleType) -> None:
    rows = [
        row(i, 0.5 / i, expert=i, cost_per_bit=0.1, kl_stderr=0.01, fragility=None)
        for i in range(1, 13)
    ]
    groups = {"sample": {"n": 12, **bench.correlations(rows)}}
    text = bench.markdown_of({"total": {"n_experts": 12}, "spearman": groups}, rows)
    shown = [line.split("|")[1].strip() for line in text.splitlines()[2:12]]
    assert shown == [str(i) for i in (*range(1, 6), *range(8, 13))]
    assert text.count("unseen") == 10
    assert text.splitlines()[-1].startswith("| sample | 12 | 1.000 |")


def test_the_documented_tables_are_those_of_the_stored_result(bench: ModuleType) -> None:
    stored = FOLDER / "results" / "expert-sensitivity-demo.json"
    result = json.loads(stored.read_text(encoding="utf-8"))
    document = (FOLDER.parent / "docs" / "sensitivity.md").read_text(encoding="utf-8")
    for table in bench.markdown_of(result, result["experts"]).split("\n\n"):
        assert table in document
    for value in result["additivity"].values():
        assert f"{value:.4f}" in document

"""What a search measured, told beside what is measured: kept only of the search's own trial."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.evaluate_text import evaluation_json, evaluation_text
from alphaquant.commands.quantize import quantize
from alphaquant.commands.searched import Made, read_searched, searched_scores
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.studies.result import SearchResult

MADE = Made("formats", "weights", "windows", is_changed=False)
ROW = {"digest": "formats", "kl": 0.5, "kl_stderr": 0.1, "same_top": 0.9, "perplexity": 7.0}
SUMMARY = {
    "model_digest": "weights",
    "calibration": {"digest": "windows"},
    "heldout": [{**ROW, "digest": "others", "kl": 9.0}, ROW],
    "heldout_text": {"source": "text", "digest": "heldout"},
}


def test_scores_are_those_of_the_assignment() -> None:
    found = searched_scores(SUMMARY, MADE)
    assert found is not None
    assert found["kl"] == 0.5
    assert found["text"]["digest"] == "heldout"


@pytest.mark.parametrize(
    ("summary", "made"),
    [
        ({}, MADE),
        (SUMMARY, replace(MADE, assignment_digest="edited")),
        (SUMMARY, replace(MADE, model_digest="other weights")),
        (SUMMARY, replace(MADE, calibration_digest=None)),
        (SUMMARY, replace(MADE, is_changed=True)),
        ({**SUMMARY, "heldout_text": None}, MADE),  # a configuration of an earlier version
        ({**SUMMARY, "heldout": "by hand"}, MADE),
        ({**SUMMARY, "heldout": [{"digest": "formats", "kl": "0.5"}]}, MADE),
    ],
)
def test_another_checkpoint_has_no_scores_of_the_search(
    summary: dict[str, Any], made: Made
) -> None:
    assert searched_scores(summary, made) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"searched": 1}', '{"searched": {"kl": 1.0}}'])
def test_reports_of_others_say_nothing(tmp_path: Path, text: str) -> None:
    assert read_searched(str(tmp_path)) is None
    (tmp_path / "quantize_report.json").write_text(text)
    assert read_searched(str(tmp_path)) is None
    assert read_searched("allenai/OLMoE-1B-7B-0924") is None


@pytest.fixture
def packed(found: SearchResult, tiny: Path, tmp_path: Path) -> Path:
    """The winner of a search as a checkpoint."""
    config, out = found.folder.path / "best.json", tmp_path / "packed"
    values = {"model": str(tiny), "config": config, "out": out, "cache": found.spec.run.cache}
    quantize(QuantizeSpec.of(**values))
    return out


def test_measured_again_on_the_same_windows_it_is_the_same_kl(packed: Path, tiny: Path) -> None:
    report = json.loads((packed / "quantize_report.json").read_text())
    text = report["searched"]["text"]
    spec = EvaluateSpec(
        model=str(packed),
        reference=str(tiny),
        data=text["source"],
        samples=text["n_samples"],
        seq_len=text["seq_len"],
        seed=text["seed"],
        dtype="float32",
    )
    found = evaluate(spec)
    (kl,) = (score.value for score in found.scores if score.metric == "kl")
    assert kl == pytest.approx(report["searched"]["kl"], rel=1e-4)
    assert "the search's kl" in evaluation_text(found)
    assert "on the same windows" in evaluation_text(found)
    assert evaluation_json(found)["searched"] == {**report["searched"], "is_same_text": True}
    other = evaluate(replace(spec, samples=2))
    assert evaluation_json(other)["searched"]["is_same_text"] is False
    said = f"for the same ones give --data {text['source']} --samples {text['n_samples']}"
    assert said in evaluation_text(other)
    # A GGUF file stands beside the report of its export.
    (packed / "model.gguf").write_bytes(b"GGUF")
    assert read_searched(str(packed / "model.gguf")) == report["searched"]

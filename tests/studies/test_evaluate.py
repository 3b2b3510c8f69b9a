"""Scores of models beside their reference."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from alphaquant.errors import AlphaQuantError, ConfigError, DataError, ModelError
from alphaquant.evaluators.base import Score
from alphaquant.studies import evaluate as studies
from alphaquant.studies.evaluate import (
    EvaluateSpec,
    evaluate,
    evaluation_json,
    evaluation_text,
)
from alphaquant.testing.checkpoints import save_tiny


@pytest.fixture
def spec(tiny: Path, texts: dict[str, Path]) -> EvaluateSpec:
    """The tiny model against itself on four short windows."""
    return EvaluateSpec(str(tiny), str(tiny), data=str(texts["heldout"]), n_samples=4, seq_len=24)


def values_of(scores: tuple[Score, ...]) -> dict[str, float]:
    return {score.metric: score.value for score in scores}


def test_model_is_no_different_from_itself(spec: EvaluateSpec) -> None:
    found = evaluate(spec)
    values = values_of(found.scores)
    assert values["kl"] == pytest.approx(0.0, abs=1e-9)
    assert values["same_top"] == 1.0
    assert values["perplexity"] == values_of(found.reference_scores)["perplexity"]
    assert all(score.stderr is not None for score in found.scores)


def test_perplexity_alone_needs_no_reference(spec: EvaluateSpec) -> None:
    both = values_of(evaluate(spec).scores)["perplexity"]
    alone = evaluate(replace(spec, reference=None, tasks=("ppl",)))
    assert values_of(alone.scores) == {"perplexity": pytest.approx(both, rel=1e-6)}
    assert alone.reference_scores == ()


def test_tasks_choose_the_metrics(spec: EvaluateSpec) -> None:
    assert values_of(evaluate(replace(spec, tasks=("kl",))).scores).keys() == {"kl", "same_top"}


def test_text_and_json_say_the_same(spec: EvaluateSpec) -> None:
    found = evaluate(spec)
    content = json.loads(json.dumps(evaluation_json(found)))
    assert content["data"]["digest"] == found.tokens.digest
    assert [s["metric"] for s in content["scores"]] == ["kl", "same_top", "perplexity"]
    text = evaluation_text(found)
    for score in content["scores"]:
        assert f"{score['value']:.6f}" in text
    assert "4 of " in text.splitlines()[-1]
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_one_model_is_in_memory_at_a_time(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[nn.Module]] = []
    load = studies.open_model

    def load_alone(*args: Any) -> nn.Module:
        gc.collect()
        assert all(earlier() is None for earlier in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(studies, "open_model", load_alone)
    evaluate(spec)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reference": None}, ConfigError, "give --reference"),
        ({"tasks": ("mmlu",)}, ConfigError, "mmlu.*kl, ppl"),
        ({"tasks": ()}, ConfigError, "none.*kl, ppl"),
        ({"model": "/nowhere"}, ModelError, "/nowhere"),
        ({"reference": "/nowhere"}, ModelError, "/nowhere"),
        ({"data": "nothing.txt"}, DataError, "nothing.txt"),
        ({"seq_len": 4000}, DataError, "4000"),
        ({"n_samples": 100_000}, DataError, "too short"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"device": "quantum"}, ModelError, "quantum"),
    ],
)
def test_bad_input_is_refused(
    changes: dict[str, Any], error: type[AlphaQuantError], words: str, spec: EvaluateSpec
) -> None:
    with pytest.raises(error, match=words):
        evaluate(replace(spec, **changes))


def test_reference_with_another_vocabulary_is_refused(spec: EvaluateSpec, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", vocab_size=4100)
    with pytest.raises(AlphaQuantError, match="4100"):
        evaluate(replace(spec, reference=str(other)))

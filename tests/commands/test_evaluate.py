"""Scores of models beside their reference."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from alphaquant.commands import evaluate as command
from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.evaluate_text import evaluation_json, evaluation_text
from alphaquant.errors import AlphaQuantError, ConfigError, DataError, ModelError
from alphaquant.evaluators.base import Score
from alphaquant.evaluators.registry import EVALUATORS
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import gptq, save_foreign

MEASURED = {name: entry for name, entry in EVALUATORS.items() if not entry.counts}


@pytest.fixture
def spec(tiny: Path, texts: dict[str, Path]) -> EvaluateSpec:
    """The tiny model against itself on four short windows."""
    return EvaluateSpec(
        model=str(tiny), reference=str(tiny), data=str(texts["heldout"]), samples=4, seq_len=24
    )


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    """Three questions and two examples of one MMLU subject."""
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install .[tasks]")
    for part, n in (("test", 3), ("dev", 2)):
        (tmp_path / part).mkdir()
        rows = [f"Question {i} of {part}?,w,x,y,z,{'ABCD'[i]}\n" for i in range(n)]
        (tmp_path / part / f"anatomy_{part}.csv").write_text("".join(rows))
    return tmp_path


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
    alone = evaluate(replace(spec, reference=None, tasks="perplexity"))
    assert values_of(alone.scores) == {"perplexity": pytest.approx(both, rel=1e-6)}
    assert alone.reference_scores == ()


def test_tasks_choose_the_metrics(spec: EvaluateSpec) -> None:
    assert values_of(evaluate(replace(spec, tasks="kl")).scores).keys() == {"kl", "same_top"}


def test_text_and_json_say_the_same(spec: EvaluateSpec) -> None:
    found = evaluate(spec)
    content = json.loads(json.dumps(evaluation_json(found)))
    assert found.tokens is not None
    assert content["data"]["digest"] == found.tokens.digest
    assert [s["metric"] for s in content["scores"]] == ["kl", "same_top", "perplexity"]
    text = evaluation_text(found)
    for score in content["scores"]:
        assert f"{score['value']:.6f}" in text
    assert "4 of " in text.splitlines()[-1]
    assert max(map(len, text.splitlines()[:-1])) <= 80
    narrow = evaluation_text(found, 50)
    lines = [line for line in narrow.splitlines() if not line.startswith("/")]  # a path
    assert max(map(len, lines)) <= 50
    assert narrow.count("original") == text.count("original")


def test_every_task_measures_both_models(spec: EvaluateSpec) -> None:
    found = evaluate(replace(spec, tasks=",".join(MEASURED)))
    metrics = [metric for entry in MEASURED.values() for metric in entry.names]
    assert [s.metric for s in found.scores] == metrics
    assert [s.metric for s in found.reference_scores] == metrics
    values = values_of(found.scores)
    assert (values["router_kl"], values["expert_overlap"]) == (0.0, 1.0)
    assert set(found.details) == set(found.reference_details) == {"utilization", "drift"}
    lines = evaluation_text(found).splitlines()
    with_original = {line.split()[0] for line in lines if "original" in line}
    assert with_original == {n for e in MEASURED.values() if not e.compares for n in e.names}


def test_perplexity_alone_of_two_models_measures_both(spec: EvaluateSpec, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", vocab_size=4096)
    found = evaluate(replace(spec, model=str(other), tasks="perplexity"))
    alone = evaluate(replace(spec, tasks="perplexity", reference=None))
    assert values_of(found.reference_scores) == values_of(alone.scores)
    assert values_of(found.scores) != values_of(alone.scores)


def test_tasks_of_lm_eval_stand_beside_those_on_windows(
    spec: EvaluateSpec, task_data: Path
) -> None:
    changes: dict[str, Any] = {"shots": 2, "limit": 2, "task_data": task_data}
    found = evaluate(replace(spec, tasks="mmlu_anatomy,perplexity", **changes))
    assert [s.metric for s in found.scores] == ["perplexity", "mmlu_anatomy.acc"]
    assert values_of(found.scores) == values_of(found.reference_scores)
    assert found.scores[1].n_samples == 2
    content = json.loads(json.dumps(evaluation_json(found)))
    details = content["details"]["mmlu_anatomy"]
    assert content["reference_details"]["mmlu_anatomy"] == details
    assert (details["limit"], details["tasks"][0]["n_shots"]) == (2, 2)
    assert content["task_data"] == str(task_data)
    lines = evaluation_text(found).splitlines()
    assert lines[-1].endswith(": 2 of 3 documents of 1 tasks, 2 shots")
    assert "windows" in lines[-2]


def test_without_windows_there_are_none_in_the_result(spec: EvaluateSpec, task_data: Path) -> None:
    settings: dict[str, Any] = {
        "reference": None,
        "tasks": "mmlu_anatomy",
        "task_data": task_data,
    }
    found = evaluate(replace(spec, data="nothing.txt", **settings))
    assert found.tokens is None
    assert evaluation_json(found)["data"] is None
    assert "windows" not in evaluation_text(found)


def test_prompts_that_were_cut_are_told(spec: EvaluateSpec, task_data: Path) -> None:
    long = "and " * 3000
    (task_data / "test" / "anatomy_test.csv").write_text(f"{long},w,x,y,z,A\nq,w,x,y,z,B\n")
    settings: dict[str, Any] = {
        "reference": None,
        "tasks": "mmlu_anatomy",
        "task_data": task_data,
    }
    found = evaluate(replace(spec, **settings))
    limit = found.details["mmlu_anatomy"]["max_length"]
    assert evaluation_text(found).endswith(f", 1 prompts cut to the last {limit} tokens")


@pytest.mark.parametrize(("limit", "expected"), [(48, 48), (4096, 2048)])
def test_windows_are_as_long_as_the_model_takes_up_to_2048(
    limit: int, expected: int, spec: EvaluateSpec, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", max_position_embeddings=limit)
    changes: dict[str, Any] = {
        "model": str(model),
        "reference": None,
        "tasks": "perplexity",
        "seq_len": None,
    }
    found = evaluate(replace(spec, samples=2, **changes))
    assert found.tokens is not None
    assert found.tokens.tokens.shape == (2, expected)
    assert f"windows of {expected} tokens" in evaluation_text(found)


def test_windows_of_the_demo_are_those_of_its_training(spec: EvaluateSpec) -> None:
    demo = replace(spec, model="demo", reference=None, tasks="perplexity", seq_len=None, samples=2)
    found = evaluate(replace(demo, data="demo"))
    assert found.tokens is not None
    assert found.tokens.tokens.shape == (2, 256)


def test_progress_counts_evaluators_of_both_models(spec: EvaluateSpec) -> None:
    calls: list[tuple[str, int, int]] = []
    evaluate(replace(spec, tasks="kl,perplexity,utilization"), progress=lambda *c: calls.append(c))
    steps = [(done, total) for stage, done, total in calls if stage == "evaluate"]
    assert sorted(set(steps)) == [(done, 4) for done in range(5)]


@pytest.mark.parametrize("with_lm_eval", [False, True])
def test_one_model_is_in_memory_at_a_time(
    with_lm_eval: bool, spec: EvaluateSpec, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_lm_eval:
        spec = replace(spec, tasks=",".join(["mmlu_anatomy", *MEASURED]), task_data=task_data)
    loaded: list[weakref.ref[nn.Module]] = []
    load = command.open_model

    def load_alone(*args: Any) -> nn.Module:
        gc.collect()
        assert all(earlier() is None for earlier in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(command, "open_model", load_alone)
    evaluate(spec)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reference": None, "tasks": "kl"}, ConfigError, "give --reference"),
        ({"tasks": "utilisation"}, ConfigError, "utilisation.*kl, perplexity.*mean utilization"),
        (
            {"tasks": "drift,perplexity", "reference": None},
            ConfigError,
            "drift asked.*--reference",
        ),
        ({"shots": 5}, ConfigError, "--shots 5 given.*kl, perplexity"),
        ({"limit": 5}, ConfigError, "--limit 5 given.*kl, perplexity"),
        ({"task_data": Path("d")}, ConfigError, "--task-data d given.*kl, perplexity"),
        ({"task_data": Path("d"), "tasks": "arc_easy"}, ConfigError, "add mmlu"),
        ({"tasks": ","}, ConfigError, "none.*kl, perplexity"),
        ({"model": "/nowhere"}, ModelError, "/nowhere"),
        ({"reference": "/nowhere"}, ModelError, "/nowhere"),
        ({"data": "nothing.txt"}, DataError, "nothing.txt"),
        ({"seq_len": 4000}, DataError, "4000"),
        ({"samples": 100_000}, DataError, "too short"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"device": "quantum"}, ModelError, "quantum"),
    ],
)
def test_bad_input_is_refused(
    changes: dict[str, Any], error: type[AlphaQuantError], words: str, spec: EvaluateSpec
) -> None:
    with pytest.raises(error, match=words):
        evaluate(replace(spec, **changes))


def test_missing_files_of_mmlu_are_told_before_a_model_is_loaded(
    spec: EvaluateSpec, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(command, "open_model")
    with pytest.raises(DataError, match=r"mmlu_|astronomy_test.csv"):
        evaluate(replace(spec, tasks="mmlu_astronomy", task_data=task_data))


def test_reference_with_another_vocabulary_is_refused(spec: EvaluateSpec, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", vocab_size=4100)
    with pytest.raises(AlphaQuantError, match="4100"):
        evaluate(replace(spec, reference=str(other)))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A mixed_precision file: attention of a tiny model's first layer in GPTQ."""
    base = save_tiny(tmp_path / "base")
    save_foreign(base, tmp_path / "gptq", gptq(4, 8), lambda m: ".0.self_attn.q" in m)
    file = tmp_path / "mix.yaml"
    mapping = {"model.layers.0.self_attn.q_proj.weight": "gptq_int4"}
    config = MixedPrecisionConfig(base, {"gptq_int4": tmp_path / "gptq"}, mapping)
    file.write_text(config.to_yaml())
    return file


def test_a_mixed_precision_file_is_measured_beside_its_base(
    spec: EvaluateSpec, mixed: Path
) -> None:
    """Capability 86: the statistics stand beside the scores."""
    base = str(mixed.parent / "base")
    found = evaluate(replace(spec, model=str(mixed), reference=base, tasks="kl"))
    assert values_of(found.scores)["kl"] > 0
    content = evaluation_json(found)["mixed_precision"]["model"]
    assert content["loaded"] == content["total"] == 1
    assert "model: loaded 1 of 1 weights, matrices 1 gptq v1 4 bits g8" in evaluation_text(found)
    alone = evaluate(replace(spec, model=str(mixed), reference=None))
    assert values_of(alone.scores).keys() == {"perplexity"}


def test_missing_weights_of_a_mixed_precision_file_are_an_error_unless_allowed(
    spec: EvaluateSpec, mixed: Path
) -> None:
    """Capability 87."""
    text = mixed.read_text() + "    model.layers.0.self_attn.z_proj.weight: gptq_int4\n"
    mixed.write_text(text)
    asked = replace(spec, model=str(mixed), reference=None)
    with pytest.raises(ModelError, match=r"1 of 2 weights.*z_proj"):
        evaluate(asked)
    found = evaluate(replace(asked, allow_missing=True))
    assert found.mixed["model"]["loaded"] == 1
    assert list(found.mixed["model"]["failed"]) == ["model.layers.0.self_attn.z_proj.weight"]

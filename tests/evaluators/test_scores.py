"""Scores besides bits and KL: names, refusals, and studies that optimize or report them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest

from alphaquant.commands.search import search
from alphaquant.errors import AlphaQuantError, ConfigError, DataError
from alphaquant.evaluators.base import Metric, Subject
from alphaquant.evaluators.drift import RoutingDriftEvaluator
from alphaquant.evaluators.routes import keep_routes
from alphaquant.evaluators.scores import ScorePlan, check_scores, plan_scores, split_names
from alphaquant.progress import StageClock, no_progress
from alphaquant.quant.swap import Swapper
from alphaquant.reports.sections import scores_text
from alphaquant.specs.flat import replaced
from alphaquant.specs.scores import ScoreSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import bank_formats, open_filled_bank
from alphaquant.studies.inputs import load_source
from alphaquant.studies.result import SearchResult, front_of
from alphaquant.studies.stages import load_inputs
from alphaquant.studies.store.urls import sqlite_url

MakeSpec = Callable[..., SearchSpec]


@pytest.fixture(scope="module")
def drifting(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search of three objectives that reports three more scores."""
    spec = make_spec(
        tmp_path_factory.mktemp("drifting") / "out",
        trials=18,
        objectives="bits,kl,drift",
        also="expert_overlap,load_entropy,active_bytes,same_top",
    )
    return search(spec)


def test_names_stand_for_metrics_and_evaluators_for_their_first() -> None:
    spec = ScoreSpec(
        objectives="bits,kl, drift ,same_top", also="footprint,expert_overlap,starved_experts"
    )
    check_scores(spec)
    plan = plan_scores(spec, None)
    assert [m.name for m in plan.objectives] == ["router_kl", "same_top"]
    assert [m.direction for m in plan.objectives] == ["minimize", "maximize"]
    assert [m.name for m in plan.reported] == ["active_bytes", "expert_overlap", "starved_experts"]
    assert plan.windows == ("drift", "footprint", "utilization")
    assert plan.measured == {"router_kl", "active_bytes", "expert_overlap", "starved_experts"}
    assert plan_scores(ScoreSpec(), None) == ScorePlan()
    assert split_names(" a,,b ") == ("a", "b")


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        (ScoreSpec(objectives="kl,drift"), ConfigError, "begin with bits,kl.*bits,kl,drift"),
        (
            ScoreSpec(objectives="bits,kl,drift", also="drift"),
            ConfigError,
            "drift asked for twice",
        ),
        (ScoreSpec(objectives="bits,kl,drfit"), ConfigError, "'drfit'; did you mean drift"),
        (ScoreSpec(objectives="bits,kl,latency"), ConfigError, "--latency-table"),
        (ScoreSpec(latency_table=Path("t.csv")), ConfigError, "t.csv without latency"),
        (
            ScoreSpec(objectives="bits,kl,drift", shots=5),
            ConfigError,
            "none is asked for.*mmlu_anatomy",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_model_is_read(
    spec: ScoreSpec, kind: type[AlphaQuantError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        check_scores(spec)


def test_a_missing_table_and_an_unknown_task_are_told_with_the_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv"):
        plan_scores(
            ScoreSpec(objectives="bits,kl,latency", latency_table=tmp_path / "none.csv"), None
        )
    spec = ScoreSpec(objectives="bits,kl,no_such_task_anywhere")
    with pytest.raises(ConfigError, match="no_such_task_anywhere"):
        check_scores(spec)


def test_a_further_objective_keeps_what_is_better_in_it(found: SearchResult) -> None:
    drift = Metric("router_kl", "nats/token", "minimize")
    top = Metric("same_top", "share of positions", "maximize")
    row = found.rows[0]

    def make(number: int, kl: float, drift: float, same_top: float = 0.5) -> Any:
        changes: dict[str, Any] = {"kl": kl, "same_top": same_top, "extra": {"router_kl": drift}}
        return replace(row, number=number, bits_per_weight=4.0, is_pruned=False, **changes)

    rows = [make(0, 0.1, 0.9), make(1, 0.2, 0.1), make(2, 0.3, 0.5, 0.9)]
    assert [r.number for r in front_of(rows)] == [0]
    assert {r.number for r in front_of(rows, (drift,))} == {0, 1}
    assert {r.number for r in front_of(rows, (top,))} == {0, 2}


def test_the_study_has_the_objectives_with_their_directions(drifting: SearchResult) -> None:
    url = sqlite_url(drifting.folder.path / "study.db")
    study = optuna.load_study(study_name="aq-search", storage=url)
    assert [d.name for d in study.directions] == ["MINIMIZE"] * 3
    complete = [t for t in study.trials if t.values is not None]
    assert len(complete) == len(drifting.rows) == 18
    for trial, row in zip(complete, drifting.rows, strict=True):
        assert trial.values == [row.bits_per_weight, row.kl, row.extra["router_kl"]]
    best = {t.number for t in study.best_trials}
    assert {r.number for r in drifting.front_trials} <= best


def test_nothing_is_pruned_by_kl_where_something_else_counts_too(drifting: SearchResult) -> None:
    assert not any(row.is_pruned for row in drifting.rows)


def test_a_trial_has_the_drift_that_its_weights_have(drifting: SearchResult) -> None:
    spec = drifting.spec
    source = load_source(spec.checkpoint.model, "cpu", "auto")
    tokens = load_inputs(spec, source).evaluation.tokens
    calls: list[tuple[str, int, int]] = []
    routes = keep_routes(source.map.model, tokens, 4, lambda *call: calls.append(call))
    assert calls == [
        ("scores", min(n, len(tokens)), len(tokens)) for n in range(4, len(tokens) + 4, 4)
    ]
    evaluator = RoutingDriftEvaluator(tokens, routes)
    row = max(drifting.rows, key=lambda r: r.extra["router_kl"])
    assignment = drifting.folder.load_assignment(row.digest)
    assert row.extra["router_kl"] > 0
    inputs, names = load_inputs(spec, source), bank_formats(drifting.space)
    bank = open_filled_bank(spec, inputs, names, StageClock(no_progress))
    Swapper(source.map, bank.layer).apply(assignment)
    scores = evaluator.evaluate(Subject(source.map.model)).scores
    assert [s.value for s in scores] == [row.extra["router_kl"], row.extra["expert_overlap"]]
    assert [s.stderr for s in scores] == [
        row.extra_stderr["router_kl"],
        row.extra_stderr["expert_overlap"],
    ]


def test_reports_and_tables_have_the_scores(drifting: SearchResult) -> None:
    path = drifting.folder.path
    frame = pd.read_csv(path / "trials.csv")
    for name in ("router_kl", "expert_overlap", "load_entropy", "active_bytes"):
        assert frame[name].tolist() == pytest.approx([r.extra[name] for r in drifting.rows])
    assert "router_kl_stderr" in frame and "active_bytes_stderr" not in frame
    front = json.loads((path / "front.json").read_text())
    assert front["objectives"] == ["bits_per_weight", "kl", "router_kl"]
    summary = json.loads((path / "best.json").read_text())["summary"]
    scored = {score["metric"]: score for score in summary["scores"]}
    row = next(r for r in drifting.rows if r.number == summary["trial"])
    assert scored["router_kl"]["value"] == row.extra["router_kl"]
    assert scored["router_kl"]["stderr"] == row.extra_stderr["router_kl"]
    section = scores_text(drifting)
    assert "router_kl (objective), nats/token" in section and "same_top, share" in section
    assert section in (path / "report.md").read_text()
    assert "router_kl (objective)" in (path / "report.html").read_text()


def test_without_further_scores_the_reports_have_no_section(found: SearchResult) -> None:
    assert scores_text(found) == ""
    assert "Other scores" not in (found.folder.path / "report.md").read_text()


def test_the_same_search_goes_on_and_another_objective_is_another_search(
    drifting: SearchResult,
) -> None:
    again = search(drifting.spec)
    assert again.rows == drifting.rows
    other = replaced(drifting.spec, objectives="bits,kl,utilization", also="")
    with pytest.raises(AlphaQuantError, match=r"other settings \(also, objectives\)"):
        search(other)


def test_latency_of_a_measured_table_can_be_an_objective(
    make_spec: MakeSpec, tmp_path: Path, found: SearchResult
) -> None:
    shapes = {(m.rows, m.cols) for m in found.space.inventory.matrices}
    formats = ["int3-g32", "int4-g32", "int8-row", "int4-g64", "mxfp4"]
    rows = [
        {"device": "made by hand", "kernel": "k", "format": f, "rows": r, "cols": c}
        | {"tokens": 1, "microseconds": 1.0 + i}
        for i, f in enumerate(formats)
        for r, c in shapes
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = ScoreSpec(objectives="bits,kl,latency", latency_table=table)
    result = search(make_spec(tmp_path / "out", trials=6, scores=scores))
    uniform = {r.origin: r.extra["decode_latency"] for r in result.rows}
    assert 0 < uniform["uniform:int3-g32"] < uniform["uniform:int4-g32"]


def test_a_task_of_lm_eval_can_be_an_objective(make_spec: MakeSpec, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install .[tasks]")
    for part, n in (("dev", 2), ("test", 4)):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        rows = [f"Question {i}?,one,two,three,four,{'ABCD'[i]}" for i in range(n)]
        (tmp_path / "mmlu" / part / f"anatomy_{part}.csv").write_text("\n".join(rows) + "\n")
    scores = ScoreSpec(
        objectives="bits,kl,mmlu_anatomy", task_data=tmp_path / "mmlu", task_limit=3
    )
    result = search(make_spec(tmp_path / "out", trials=4, scores=scores))
    found = {row.extra["mmlu_anatomy.acc"] for row in result.rows}
    assert found <= {0.0, 1 / 3, 2 / 3, 1.0}
    (metric,) = result.scores.objectives
    assert (metric.name, metric.direction) == ("mmlu_anatomy.acc", "maximize")

"""What the dashboard shows of a search that has ended; a failure there loses nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard import get_note
from optuna_dashboard._custom_plot_data import (  # type: ignore[import-untyped]
    get_plotly_graph_objects,
)

from alphaquant.commands.search import search
from alphaquant.commands.searching import outcome
from alphaquant.reports.decoration import FIGURE_ID, decorate
from alphaquant.reports.figures.plots import figures
from alphaquant.reports.front import config_name
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.result import SearchResult
from alphaquant.studies.store.folder import storage_of
from alphaquant.studies.store.storages import open_storage

MakeSpec = Callable[..., SearchSpec]


def shown_figures(study: optuna.Study) -> dict[str, Any]:
    """The figures of a study as the dashboard reads them."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return {k: json.loads(v) for k, v in get_plotly_graph_objects(attrs).items()}


def test_finished_search_has_its_note_its_figures_and_notes_of_all_trials(
    found: SearchResult,
) -> None:
    with open_storage(storage_of(found.folder.path), must_exist=True) as storage:
        study = optuna.load_study(study_name=found.spec.run.study, storage=storage)
        note, shown = get_note(study), shown_figures(study)
        attrs = storage.get_study_system_attrs(study._study_id)
    assert "The search is running." not in note
    assert note.count("(best)") == 1
    for row in found.gate.points:
        assert config_name(row) in note
    assert shown.keys() == {FIGURE_ID + name for name in figures(found)}
    titles = [figure["layout"]["title"]["text"] for figure in shown.values()]
    assert len(set(titles)) == len(shown)
    assert {figure["layout"]["height"] for figure in shown.values()} == {450}
    assert {figure["layout"]["title"]["xref"] for figure in shown.values()} == {"container"}
    front = shown[f"{FIGURE_ID}front"]["layout"]
    plot_height = 450 - front["margin"]["t"] - front["margin"]["b"]
    assert front["margin"]["b"] + front["legend"]["y"] * plot_height >= 4 * 19  # four lines
    trial_notes = [k for k in attrs if k.endswith(":note_ver") and k != "dashboard:note_ver"]
    assert len(trial_notes) == len(found.rows)


def test_decorating_again_replaces_and_adds_nothing(found: SearchResult) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    decorate(study, found)
    note, shown = get_note(study), shown_figures(study)
    decorate(study, found)
    assert get_note(study) == note
    assert shown_figures(study) == shown


def test_failure_is_told_and_recorded_and_loses_nothing(
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(study: optuna.Study, result: SearchResult) -> None:
        raise ValueError("no such\ncolour")

    spec = make_spec(tmp_path / "out", trials=1)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(outcome, "decorate", fail)
        result = search(spec)
    assert (spec.run.out / "best.json").exists()
    front = json.loads((spec.run.out / "front.json").read_text())
    assert front["provenance"]["dashboard_problem"] == "no such colour"
    assert result.provenance.dashboard_problem == "no such colour"
    assert "(no such colour); run the same command again" in caplog.text
    again = search(spec)
    assert again.provenance.dashboard_problem is None
    front = json.loads((spec.run.out / "front.json").read_text())
    assert "dashboard_problem" not in front["provenance"]

"""Notes say what a study and its trials are, and leave alone what a user wrote."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna_dashboard import get_note, save_note  # type: ignore[import-untyped]

from alphaquant.reports.notes import (
    YOUR_NOTES,
    begin_study_note,
    bits_table,
    save_study_note,
    save_trial_note,
    study_note,
    trial_note,
)
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.result import SearchResult
from alphaquant.studies.store.study import TrialRow

ROW = TrialRow(
    *(3, "knobs", "d0", 4.1, 1_500_000, 0.25, 1e-3, (0.2, 0.3), 0.9, 60.0, 0.2, None, 1.5)
)
INVENTORY = Inventory(
    "tiny",
    (
        Matrix("model.layers.0.self_attn.q_proj", 64, 64, "attention", 0),
        Matrix("model.layers.1.mlp.experts.0.down_proj", 64, 64, "expert", 1, 0),
        Matrix("model.layers.1.mlp.experts.1.down_proj", 64, 64, "expert", 1, 1),
    ),
)
NAMES = [matrix.name for matrix in INVENTORY.matrices]
ASSIGNMENT = Assignment(dict(zip(NAMES, ("bf16", "int4-g64", "int8-g64"), strict=True)))
SPEC = SearchSpec.of(
    model="some/model",
    budget="4.25bits",
    out=Path("o"),
    calibration="a.txt",
    calibration_samples=7,
    max_formats_per_layer=2,
)


def test_bits_are_a_row_per_layer_and_a_column_per_role() -> None:
    assert bits_table(ASSIGNMENT, INVENTORY).splitlines() == [
        "| layer | attention q | routed down |",
        "|---|---|---|",
        "| 0 | 16.00 |  |",
        "| 1 |  | 6.25 |",
    ]


def test_note_of_a_trial_has_its_scores_its_bits_and_how_to_use_it() -> None:
    note = trial_note(replace(ROW, gap=0.25), ASSIGNMENT, INVENTORY, SPEC)
    for said in (
        "# Trial 3 of the search: knobs",
        "| KL | 0.250000 +- 0.001000 nats per token, 2 windows |",
        "| predicted KL | 0.200000 nats per token |",
        "| same top token | 90.00 % |",
        "| perplexity | 60.000 |",
        "| bits per weight | 4.1000 |",
        "| checkpoint | 1500000 bytes (1.50 MB) |",
        "| solver's gap | 2.50e-01 |",
        "| digest | `d0` |",
        "| 1 |  | 6.25 |",
        "    aq-quantize --model some/model --config config.json --out DIR",
    ):
        assert said in note.replace("\n\n", "\n").split("\n")
    assert "Ended early" not in note
    assert "The same assignment" not in note


def test_what_became_of_a_trial_is_in_words() -> None:
    row = replace(ROW, duplicate_of=1, is_pruned=True)
    note = trial_note(row, ASSIGNMENT, INVENTORY, SPEC)
    assert "The same assignment as trial 1" in note
    assert "Ended early: the numbers are those of the first 2 windows" in note
    assert "it was not solved for" in note


def test_note_of_a_study_says_what_was_asked_and_what_is_counted() -> None:
    note = study_note(SPEC, ("int4-g64", "bf16"))
    for said in (
        *("some/model", "`4.25bits`, formats per layer 2", "`int4-g64`, `bf16`", counting_rule()),
        *(
            "| calibration text | `a.txt`, 7 windows |",
            "| results | `o` |",
            "--config config.json",
        ),
        "The search is running.",
    ):
        assert said in note
    assert "The search is running." not in study_note(SPEC, ("bf16",), "It ended.")


@pytest.mark.parametrize("name", ["found", "long"])
def test_every_origin_of_a_search_is_explained(name: str, request: pytest.FixtureRequest) -> None:
    result: SearchResult = request.getfixturevalue(name)
    note = study_note(result.spec, result.space.menu)
    for kind in {row.origin.split(":")[0] for row in result.rows}:
        assert f"| `{kind}" in note


def test_notes_of_a_user_stay_below_ours() -> None:
    study = optuna.create_study()
    save_note(study, "mine")
    save_study_note(study, "first")
    assert get_note(study) == f"first\n\n---\n\n{YOUR_NOTES}\n\nmine"
    save_note(study, get_note(study) + " and more")
    save_study_note(study, "second")
    assert get_note(study) == f"second\n\n---\n\n{YOUR_NOTES}\n\nmine and more"


def test_note_is_written_only_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    save_study_note(study, "x" * 5000)  # in several attributes
    monkeypatch.setattr(study._storage, "set_study_system_attr", None)
    save_study_note(study, "x" * 5000)
    begin_study_note(study, "another")
    assert get_note(study).startswith("xxx")


def test_first_note_is_that_of_a_search_that_runs() -> None:
    study = optuna.create_study()
    begin_study_note(study, "it runs")
    assert get_note(study).startswith("it runs")


def test_note_of_a_trial_is_saved_with_it() -> None:
    study = optuna.create_study()
    trial = study.ask()
    save_trial_note(trial, "a note")
    assert get_note(trial) == "a note"
    assert get_note(study) == ""

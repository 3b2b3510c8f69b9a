"""`alphaquant.search`: natural spellings are taken, wrong types are one sentence."""

from pathlib import Path

import optuna
import pytest

from alphaquant.commands import api
from alphaquant.specs.search import SearchSpec


def test_lists_paths_and_names_of_options_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SearchSpec] = []
    monkeypatch.setattr(api, "run_search", lambda spec, **calls: asked.append(spec))
    api.search(
        "4.25bits",
        model=Path("a/model"),
        formats=["int4-g64", "int8-row"],
        out="out",
        calibration_samples=7,
        heldout_samples=9,
        objectives=["bits", "kl", "perplexity"],
        also="drift",
        shots=0,
        percdamp=0.5,
    )
    (spec,) = asked
    assert (spec.limits.budget, spec.limits.formats) == ("4.25bits", "int4-g64,int8-row")
    assert (spec.checkpoint.model, spec.run.out) == ("a/model", Path("out"))
    assert (spec.texts.calibration_samples, spec.texts.heldout_samples) == (7, 9)
    scores = spec.scores
    assert (scores.objectives, scores.also, scores.shots) == ("bits,kl,perplexity", "drift", 0)
    assert spec.quantizer.percdamp == 0.5


def test_what_is_given_beside_a_file_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[SearchSpec] = []
    monkeypatch.setattr(api, "run_search", lambda spec, **calls: asked.append(spec))
    path = tmp_path / "search.toml"
    path.write_text('budget = "4bits"\nseed = 3\ntrials = 5\n')
    api.search(spec=path)
    api.search("5bits", spec=path, trials=6)
    assert asked == [
        SearchSpec.of(budget="4bits", seed=3, trials=5),
        SearchSpec.of(budget="5bits", seed=3, trials=6),
    ]


def test_optuna_is_quiet_while_a_search_runs_and_as_before_after_it() -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        with pytest.raises(KeyError), api._quiet_optuna():
            assert optuna.logging.get_verbosity() == optuna.logging.WARNING
            raise KeyError
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)

"""`alphaquant.search`: natural spellings are taken, wrong types are one sentence."""

from pathlib import Path

import optuna
import pytest

from alphaquant.commands.api import _quiet_optuna, make_spec


def test_lists_paths_and_names_of_options_are_taken() -> None:
    spec = make_spec(
        "4.25bits",
        {
            "model": Path("a/model"),
            "formats": ["int4-g64", "int8-row"],
            "out": "out",
            "calibration_samples": 7,
            "n_heldout": 9,
            "objectives": "bits,kl,perplexity",
            "also": "drift",
            "shots": 0,
            "percdamp": 0.5,
        },
    )
    assert (spec.model, spec.formats, spec.out) == ("a/model", "int4-g64,int8-row", Path("out"))
    assert (spec.data.n_calibration, spec.data.n_heldout) == (7, 9)
    scores = spec.scores
    assert (scores.objectives, scores.reported, scores.n_shots) == (
        *("bits,kl,perplexity", "drift"),
        0,
    )
    assert spec.quant.percdamp == 0.5


def test_optuna_is_quiet_while_a_search_runs_and_as_before_after_it() -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        with pytest.raises(KeyError), _quiet_optuna():
            assert optuna.logging.get_verbosity() == optuna.logging.WARNING
            raise KeyError
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)

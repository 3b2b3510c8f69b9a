"""`alphaquant.search`: natural spellings are taken, wrong types are one sentence."""

from pathlib import Path
from typing import Any

import optuna
import pytest

import alphaquant
from alphaquant.errors import AlphaQuantError, ConfigError
from alphaquant.studies.api import _quiet_optuna, make_spec
from alphaquant.studies.evaluate import EvaluateSpec
from alphaquant.studies.quantize import QuantizeSpec
from alphaquant.studies.spec import SearchSpec


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


@pytest.mark.parametrize(
    ("budget", "settings", "words"),
    [
        (None, {}, "budget is None; give str"),
        (4.25, {}, "budget is 4.25 (float); give str"),
        ("4bits", {"trials": "5"}, "trials is '5' (str); give int"),
        ("4bits", {"trials": True}, "trials is True (bool); give int"),
        ("4bits", {"timeout": "1h"}, "timeout is '1h' (str); give float or None"),
        ("4bits", {"out": 3}, "out is 3 (int); give Path"),
        ("4bits", {"model": None}, "model is None; give str"),
        ("4bits", {"formats": [4]}, "formats is [4] (list); give names such as"),
        ("4bits", {"formats": {"int4": 1}}, "formats is {'int4': 1} (dict); give str"),
        ("4bits", {"seq_len": 2.5}, "seq_len is 2.5 (float); give int or None"),
        ("4bits", {"objectives": ["kl"]}, "objectives is ['kl'] (list); give str"),
        ("4bits", {"data": "x"}, "search has no setting 'data'"),
        ("4bits", {"percdamp": "x"}, "percdamp"),
        ("4bits", {"also": "a", "reported": "b"}, "also and reported are one setting"),
        ("4bits", {"trails": 3}, "perhaps trials"),
    ],
)
def test_wrong_type_is_one_sentence(budget: Any, settings: dict[str, Any], words: str) -> None:
    search: Any = alphaquant.search
    with pytest.raises(AlphaQuantError) as refused:
        search(budget, **settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_specifications_refuse_wrong_types_too() -> None:
    wrong: Any = {"unit": "int4-g64"}
    with pytest.raises(
        ConfigError, match=r"^config is \{'unit': 'int4-g64'\} \(dict\); give Path$"
    ):
        QuantizeSpec(model="demo", config=wrong, out=Path("x"))
    for changes in ({"tasks": "kl"}, {"n_samples": "3"}, {"task_data": "x"}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} is '"):
            EvaluateSpec("demo", **changes)  # type: ignore[arg-type]
    path: Any = "text"
    with pytest.raises(ConfigError, match=r"out is 'text' \(str\); give Path"):
        SearchSpec(out=path)


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

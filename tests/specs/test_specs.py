"""Every option once: types, ranges, names, and the three doors that read them."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from alphaquant.cli.application import spec_text
from alphaquant.errors import ConfigError
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.flat import flat, make, options_of, replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.quantizer import QuantSettings, changed
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.specs.texts import TextSpec

KINDS = (SearchSpec, QuantizeSpec, EvaluateSpec, SensitivitySpec)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_text_and_a_name_of_its_own(kind: type[Any]) -> None:
    options = list(options_of(kind))
    assert len({o.name for o in options}) == len(options) > 8
    assert all(len(o.text) >= 8 for o in options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no budget; give one such as 4.25bits, 13GiB, or the memory of a GPU"),
        ({"budget": True}, r"budget is True \(bool\); give str"),
        ({"budget": "4", "trials": 0}, "trials is 0; must be >= 1"),
        ({"budget": "4", "trials": "5"}, r"trials is '5' \(str\); give int or None"),
        ({"budget": "4", "trials": True}, r"trials is True \(bool\); give int"),
        ({"budget": "4", "calibration_samples": 0}, "calibration_samples is 0; must be >= 1"),
        ({"budget": "4", "evaluation_samples": 1}, "evaluation_samples is 1; must be >= 2"),
        ({"budget": "4", "heldout_samples": 1}, "heldout_samples is 1; must be >= 2"),
        ({"budget": "4", "seq_len": 1}, "seq_len is 1; must be >= 2"),
        ({"budget": "4", "timeout": -1.0}, "timeout is -1.0; must be >= 0"),
        ({"budget": "4", "timeout": float("nan")}, "timeout is nan; give a finite number"),
        ({"budget": "4", "max_formats_per_layer": 0}, "max_formats_per_layer is 0; must be >= 1"),
        ({"budget": "4", "shots": -1}, "shots is -1; must be >= 0"),
        ({"budget": "4", "task_limit": -1}, "task_limit is -1; must be >= 1"),
        ({"budget": "4", "sequential": True}, "no setting 'sequential'"),
        ({"budget": "4", "mode": "x"}, r"mode is 'x' \(str\); use knobs or groups"),
        ({"budget": "4", "percdamp": float("nan")}, "percdamp is nan; give a finite number"),
        ({"budget": "4", "n_starts": 3}, "n_starts is 3; must be <= 2"),
        ({"budget": "4", "layer_minimum_bits": 0.0}, "layer_minimum_bits is 0.0; must be > 0"),
        ({"budget": "4", "trails": 5}, "no setting 'trails'; perhaps trials"),
        ({"budget": "4", "formats": ["a", 3]}, "formats is .* give names"),
        ({"budget": "4", "study": " "}, "the study has no name"),
        ({"budget": "4", "texts": TextSpec(), "bos": "never"}, "texts and bos are both given"),
    ],
)
def test_a_setting_that_makes_no_sense_is_told_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(SearchSpec, settings, "search")


def test_flat_names_and_parts_are_the_same_specification() -> None:
    settings = {"budget": "4bits", "formats": ["a", "b"], "out": "x", "calibration_samples": 4}
    spec = make(SearchSpec, settings, "search")
    assert spec.limits.formats == "a,b"
    assert spec.run.out == Path("x")
    assert spec.texts == TextSpec(calibration_samples=4)
    assert make(SearchSpec, flat(spec), "search") == spec
    whole = {"budget": "4bits", "formats": "a,b", "out": "x"}
    assert make(SearchSpec, whole | {"texts": spec.texts}, "search") == spec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trials", 3),
        ("timeout", 9.0),
        ("out", Path("x")),
        ("cache", Path("y")),
        ("overwrite", True),
        ("storage", "sqlite:///z"),
        ("study", "s"),
    ],
)
def test_how_long_and_where_are_no_facts(name: str, value: Any) -> None:
    spec = SearchSpec.of(budget="4.25bits")
    assert replaced(spec, **{name: value}).facts() == spec.facts()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "x"),
        ("budget", "3bits"),
        ("formats", "int"),
        ("profile", "vllm"),
        ("mode", "groups"),
        ("grouping", "utilization"),
        ("allocator", "fisher"),
        ("allocators", "pmq"),
        ("max_formats_per_layer", 2),
        ("layer_minimum_bits", 3.0),
        ("active_budget", "1MiB"),
        ("seed", 1),
        ("heldout_samples", 9),
        ("method", "rtn"),
        ("also", "drift"),
        ("sampler", "gp"),
        ("device", "cpu"),
        ("dtype", "float32"),
    ],
)
def test_what_decides_the_trials_is_a_fact(name: str, value: Any) -> None:
    spec = SearchSpec.of(budget="4.25bits")
    assert replaced(spec, **{name: value}).facts() != spec.facts()


def test_facts_survive_json() -> None:
    facts = SearchSpec.of(budget="4.25bits", latency_table="t.csv").facts()
    assert json.loads(json.dumps(facts)) == facts


def test_a_budget_in_other_words_is_the_same_search() -> None:
    facts = SearchSpec.of(budget="4.25 bpw").facts()
    assert facts == SearchSpec.of(budget="4.25bits").facts()
    assert facts["budget"] == "4.25bits"
    assert facts != SearchSpec.of(budget="4.24bits").facts()


@pytest.mark.parametrize("number", [4.25, 4, 13])
def test_a_budget_that_is_a_number_is_its_text(number: float) -> None:
    asked = SearchSpec.of(budget=number, active_budget=number)
    assert asked == SearchSpec.of(budget=str(number), active_budget=str(number))
    assert asked.facts()["budget"] == f"{number}bits"


def test_a_change_of_settings_leaves_what_nobody_gave() -> None:
    base = QuantSettings(percdamp=0.5)
    asked = {"model": "m", "config": "c", "n_starts": 1, "sequential": True}
    spec = make(QuantizeSpec, asked, "quantize")
    assert changed(base, spec.quantizer) == QuantSettings(
        percdamp=0.5, n_starts=1, sequential=True
    )
    with pytest.raises(ConfigError, match="n_starts is 9"):
        make(QuantizeSpec, asked | {"n_starts": 9}, "quantize")


@pytest.mark.parametrize("kind", KINDS)
def test_a_printed_file_says_the_same(kind: type[Any]) -> None:
    needed = {"budget": "3bits", "model": "m", "config": Path("c"), "format": "int2-g64"}
    names = {o.name for o in options_of(kind)}
    spec = make(kind, {k: v for k, v in needed.items() if k in names}, "it")
    assert make(kind, tomllib.loads(spec_text(spec)), "it") == spec
    assert all(f"\n{'# ' * (flat(spec)[n] is None)}{n} =" in spec_text(spec) for n in names)


def test_tasks_have_a_default_that_depends_on_the_reference() -> None:
    assert EvaluateSpec(model="m").names == ("perplexity",)
    assert EvaluateSpec(model="m", reference="r").names == ("kl", "perplexity")
    assert EvaluateSpec(model="m", tasks=" a, b,").names == ("a", "b")

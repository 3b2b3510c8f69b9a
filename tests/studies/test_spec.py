"""Specifications: what counts as the same search, and what is refused at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alphaquant.studies.spec import SERVING_MENU, DataSpec, SearchSpec, menu_of

from alphaquant.errors import BudgetError, ConfigError, FormatError
from alphaquant.search.side.constraints import SideConstraints
from alphaquant.spaces.formats import DEFAULT_MENU
from alphaquant.spaces.profiles import find_profile
from alphaquant.specs.quantizer import QuantSettings


@pytest.mark.parametrize(
    ("field", "value"),
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
def test_how_long_and_where_are_no_facts(field: str, value: Any) -> None:
    assert replace(SearchSpec(), **{field: value}).facts() == SearchSpec().facts()


@pytest.mark.parametrize(
    ("field", "value"),
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
        ("data", DataSpec(n_heldout=9)),
        ("quant", QuantSettings(method="rtn")),
        ("n_draws", 2),
        ("sampler", "gp"),
        ("device", "cpu"),
        ("dtype", "float32"),
    ],
)
def test_what_decides_the_trials_is_a_fact(field: str, value: Any) -> None:
    assert replace(SearchSpec(), **{field: value}).facts() != SearchSpec().facts()


def test_facts_survive_json() -> None:
    assert json.loads(json.dumps(SearchSpec().facts())) == SearchSpec().facts()


def test_a_budget_in_other_words_is_the_same_search() -> None:
    assert SearchSpec(budget="4.25 bpw").facts() == SearchSpec(budget="4.25bits").facts()
    assert SearchSpec(budget="4.24bits").facts() != SearchSpec(budget="4.25bits").facts()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 0}, "trials is 0; use 1 or more"),
        ({"timeout": -1.0}, "timeout is -1.0; use 0 or more"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"n_draws": 0}, "n_draws is 0"),
        ({"mode": "manual"}, "mode 'manual' is not known; use one of knobs, groups"),
        ({"quant": QuantSettings(sequential=True)}, "use it with aq-quantize"),
    ],
)
def test_impossible_specification_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SearchSpec(**change)


def test_study_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--study NAME"):
        SearchSpec(study=" ")


def test_side_constraints_are_those_asked_for_with_the_active_budget_in_bits() -> None:
    assert SearchSpec().constraints == SideConstraints()
    spec = SearchSpec(max_formats_per_layer=2, layer_minimum_bits=3.5, active_budget="1KiB")
    assert spec.constraints == SideConstraints(2, 3.5, 8192)
    assert SearchSpec(active_budget="1KB").constraints == SideConstraints(active_bits=8000)
    with pytest.raises(BudgetError, match="active budget '4.25bits'; write bytes, such as 600MiB"):
        _ = SearchSpec(active_budget="4.25bits").constraints
    with pytest.raises(ConfigError, match="layer_minimum_bits = -1.0"):
        _ = SearchSpec(layer_minimum_bits=-1.0).constraints


@pytest.mark.parametrize(
    ("field", "least"),
    [("n_calibration", 1), ("n_evaluation", 2), ("n_heldout", 2), ("seq_len", 2)],
)
def test_too_few_windows_are_refused(field: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {least - 1}; use {least} or more"):
        DataSpec(**{field: least - 1})
    DataSpec(**{field: least})


def test_auto_menu_is_that_of_the_profile() -> None:
    for name in ("any", "kernels"):
        assert sorted(menu_of("auto", find_profile(name))) == sorted(DEFAULT_MENU)
    assert sorted(menu_of("auto", find_profile("vllm"))) == sorted(SERVING_MENU)
    assert "mxfp4" not in menu_of("auto", find_profile("sglang"))


def test_stated_menu_is_narrowed_to_what_the_profile_loads() -> None:
    assert menu_of("int4-g64,int3-g64-asym", find_profile("vllm")) == ("int4-g64",)
    with pytest.raises(FormatError, match="profile vllm loads"):
        menu_of("int3-g64-asym", find_profile("vllm"))

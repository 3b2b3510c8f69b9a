"""What a report warns of, and that it is silent where there is nothing to warn of."""

import math
from dataclasses import replace
from typing import Any

import pytest

from alphaquant.reports.cautions import FEW_WINDOWS, cautions
from alphaquant.reports.sections import coverage_text
from alphaquant.studies.gate.judge import SEARCH, DomainScore
from alphaquant.studies.result import Probe, SearchResult


@pytest.fixture
def sound(found: SearchResult) -> SearchResult:
    """The finished search as if it had measured many windows and had nothing to warn of."""
    scores = {"books": DomainScore(FEW_WINDOWS, 0.1, 0.01)}
    rows = tuple(replace(row, domains=scores, replaced_by=None) for row in found.gate.rows)
    many = tuple(replace(row, kl_per_window=(row.kl,) * FEW_WINDOWS) for row in found.rows)
    gate = replace(found.gate, rows=rows, winner=SEARCH)
    told = replace(found.provenance, rare_matrices=())
    return replace(found, rows=many, gate=gate, provenance=told, probe=None)


def with_best(result: SearchResult, **changes: Any) -> SearchResult:
    gate, name = result.gate, result.gate.best_name
    rows = tuple(replace(r, **changes) if r.name == name else r for r in gate.rows)
    return replace(result, gate=replace(gate, rows=rows))


def test_a_sound_result_has_no_warnings(sound: SearchResult) -> None:
    trusted = Probe(16, 6, {"default": 0.9})
    assert cautions(replace(sound, probe=trusted)) == cautions(sound) == ()


@pytest.mark.parametrize("rho", [0.3, math.nan])
def test_costs_that_rank_badly_are_not_to_be_trusted(sound: SearchResult, rho: float) -> None:
    (text,) = cautions(replace(sound, probe=Probe(16, 6, {"default": rho})))
    assert text.startswith("The default costs are not to be trusted")


def test_rare_experts_are_named(sound: SearchResult) -> None:
    rare = ("model.layers.0.mlp.experts.3.up_proj",)
    told = replace(sound.provenance, rare_matrices=rare)
    result = replace(sound, provenance=told)
    (text,) = cautions(result)
    assert "experts.3.up_proj" in text and text in coverage_text(result)


def test_a_short_bank_says_what_was_not_compared_with(sound: SearchResult) -> None:
    told = replace(sound.provenance, lacking_formats=("int3-g64", "int5-g128-asym"))
    (text,) = cautions(replace(sound, provenance=told))
    assert "2 formats" in text and "int3-g64, int5-g128-asym" in text and "--bank full" in text


def test_a_uniform_winner_is_said(sound: SearchResult) -> None:
    name = next(r.name for r in sound.gate.rows if not r.name.startswith("trial-"))
    (text,) = cautions(replace(sound, gate=replace(sound.gate, winner=name)))
    assert text.startswith("best.json is uniform ")


def test_withheld_points_are_counted(sound: SearchResult) -> None:
    rival = next(row.rival for row in sound.gate.rows if row.rival is not None)
    (one,) = cautions(with_best(sound, replaced_by=rival))
    assert one.startswith("1 point of the front was withheld")
    both = tuple(replace(row, replaced_by=rival) for row in sound.gate.rows)
    (many,) = cautions(replace(sound, gate=replace(sound.gate, rows=both)))
    assert many.startswith(f"{len(both)} points of the front were withheld")


def test_few_windows_of_either_text_make_rough_intervals(sound: SearchResult) -> None:
    few = {"books": DomainScore(FEW_WINDOWS - 2, 0.1, 0.01), "code": DomainScore(1, 0.1, None)}
    said = cautions(with_best(sound, domains=few))
    assert said[0].startswith(f"Only {FEW_WINDOWS - 1} windows of held-out text")
    assert said[1] == "One held-out window only, so no interval, of: code."
    rows = tuple(replace(r, kl_per_window=r.kl_per_window[1:]) for r in sound.rows)
    (text,) = cautions(replace(sound, rows=rows))
    assert text.startswith(f"Only {FEW_WINDOWS - 1} windows of evaluation text")

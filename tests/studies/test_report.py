"""Sentences and tables of a report, for every way a search can end."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from alphaquant.spaces.assignment import BitCount, uniform_assignment
from alphaquant.studies.report import (
    bit_lines,
    config_name,
    config_text,
    front_json,
    rank_correlation,
    report_text,
    summary_text,
    trial_line,
    trial_note,
    trials_frame,
    winner_text,
)
from alphaquant.studies.result import SearchResult


def with_gate(found: SearchResult, **changes: Any) -> SearchResult:
    return replace(found, gate=replace(found.gate, **changes))


def named(found: SearchResult, name: str, **changes: Any) -> SearchResult:
    """The result with some numbers of one held-out row set otherwise."""
    rows = [replace(r, **changes) if r.name == name else r for r in found.gate.rows]
    return with_gate(found, rows=tuple(rows))


def test_winner_is_compared_with_the_best_uniform_format_that_fits(found: SearchResult) -> None:
    result = with_gate(found, winner="search")
    result = named(named(result, "best", kl=0.001), "int4-g32", kl=0.002)
    result = named(named(result, "mxfp4", kl=0.004), "int8-row", kl=0.0001)
    text = winner_text(result)
    assert "0.500 x uniform int4-g32 (0.002000 at 4.500 bits)" in text
    assert "int8-row" not in text


def test_rival_outside_the_menu_is_named_as_such(found: SearchResult) -> None:
    result = named(with_gate(found, winner="search"), "mxfp4", kl=1e-9)
    assert "uniform mxfp4 (0.000000 at 4.250 bits, which is not in --formats)" in winner_text(
        result
    )


def test_uniform_winner_is_said_in_report_and_summary(found: SearchResult) -> None:
    inventory = found.space.inventory
    result = with_gate(
        found, winner="int4-g32", published=uniform_assignment(inventory, "int4-g32")
    )
    text = "best.json is uniform int4-g32"
    assert text in report_text(result)
    assert text in summary_text(result)
    assert front_json(result)["best"]["winner"] == "int4-g32"
    assert front_json(result)["best"]["bits_per_weight"] == 4.5


def test_budget_below_all_uniform_formats_is_said(found: SearchResult) -> None:
    result = with_gate(found, winner="search", rows=found.gate.rows[:1])
    assert "nothing to beat" in winner_text(result)


def test_perfect_rival_gives_no_ratio(found: SearchResult) -> None:
    result = named(with_gate(found, winner="search"), "int4-g32", kl=0.0)
    assert "beside uniform int4-g32" in winner_text(result)


def test_configuration_of_a_uniform_format_that_was_no_trial(found: SearchResult) -> None:
    result = with_gate(found, winner="bf16")
    assignment = uniform_assignment(found.space.inventory, "bf16")
    summary = json.loads(config_text(result, assignment, None))["summary"]
    assert (summary["trial"], summary["origin"], summary["scores"]) == (None, "uniform:bf16", [])


def test_configuration_of_a_held_out_assignment_carries_that_measurement(
    found: SearchResult,
) -> None:
    row = next(row for row in found.rows if row.origin == "uniform:int4-g32")
    assignment = found.folder.load_assignment(row.digest)
    result = named(found, "int4-g32", kl=0.125)
    summary = json.loads(config_text(result, assignment, row))["summary"]
    assert [r["kl"] for r in summary["heldout"]] == [0.125]


def test_rank_correlation_counts_distinct_trials(found: SearchResult) -> None:
    rows = [
        replace(found.rows[0], number=n, predicted_kl=p, kl=k, duplicate_of=d)
        for n, (p, k, d) in enumerate([(1, 5, None), (2, 6, None), (3, 9, None), (0, 99, 1)])
    ]
    assert rank_correlation(replace(found, rows=tuple(rows))) == pytest.approx(1.0)
    assert rank_correlation(replace(found, rows=tuple(rows[:2]))) is None
    constant = tuple(replace(row, predicted_kl=1.0) for row in rows)
    assert rank_correlation(replace(found, rows=constant)) is None
    assert "KL: not defined" in report_text(replace(found, rows=constant))


def test_three_bit_counts() -> None:
    counts = BitCount(4.0, 4.25, 6.0, 500, 1000)
    assert bit_lines(counts) == [
        "routed experts   4.0000 bits per weight",
        "all quantizable  4.2500 bits per weight, 500 bytes",
        "whole checkpoint 6.0000 bits per weight, 1000 bytes",
    ]
    assert bit_lines(replace(counts, routed_bits_per_weight=None))[0] == "routed experts   none"


def test_summary_fits_80_columns_and_its_names_can_be_typed(found: SearchResult) -> None:
    lines = summary_text(found).splitlines()
    paths = [line for line in lines if str(found.folder.path) in line or found.spec.model in line]
    assert all(len(line) <= 80 for line in lines if line not in paths)
    for row in found.front:
        assert (found.folder.path / config_name(row)).exists()


def test_trials_table_keeps_whole_numbers_whole(found: SearchResult) -> None:
    rows = (*found.rows[:2], replace(found.rows[1], number=2, duplicate_of=1))
    text = trials_frame(replace(found, rows=rows)).to_csv(index=False)
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["duplicate_of"] for row in table] == ["", "", "1"]
    assert [float(row["kl"]) for row in table] == [row.kl for row in rows]
    assert "kl_per_window" not in table[0]


def test_line_of_a_trial(found: SearchResult) -> None:
    row = replace(
        found.rows[0], number=4, kl=0.002, kl_stderr=0.0005, bits_per_weight=4.25, seconds=1.26
    )
    assert trial_line(row) == (
        "trial 4: uniform:int3-g32, 4.250 bits, KL 0.002000 +- 0.000500, 1.3 s"
    )
    assert trial_note(row) == "0.002000 at 4.25 bits"
    assert "uniform:int3-g32 = trial 2," in trial_line(replace(row, duplicate_of=2))


def test_rare_experts_are_listed(found: SearchResult) -> None:
    facts = {**found.facts, "calibration_tokens_per_expert": {"x.experts": [100, 24, 276, 0]}}
    assert "| x.experts | 400 | 0 | 276 | 1, 3 |" in report_text(replace(found, facts=facts))
    dense = {**found.facts, "calibration_tokens_per_expert": {}}
    assert "No routed experts" in report_text(replace(found, facts=dense))

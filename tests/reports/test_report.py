"""Sentences, tables and files of a report, for every way a search can end."""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from alphaquant.reports.front import config_name
from alphaquant.reports.notes import study_note
from alphaquant.reports.report import (
    bit_lines,
    config_text,
    front_json,
    report_text,
    summary_text,
    trial_line,
    trial_note,
    trials_frame,
    write_configs,
    write_report,
)
from alphaquant.reports.sections import (
    costs_text,
    coverage_text,
    domain_text,
    files_table,
    gains_table,
    published_table,
    search_text,
    uniform_table,
    withheld_text,
)
from alphaquant.reports.verdict import headline, why_text, winner_text
from alphaquant.spaces.assignment import BitCount, uniform_assignment
from alphaquant.spaces.config import load_config, resolve
from alphaquant.specs.flat import replaced
from alphaquant.studies.gate.intervals import Difference
from alphaquant.studies.gate.judge import Comparison, DomainScore, GateResult, HeldoutRow
from alphaquant.studies.result import Probe, SearchResult
from alphaquant.studies.store.folder import RunFolder

BETTER = Difference(0.001, 0.0001, 0.0008, 0.0012)


def beside(name: str, kl: float, bits: float = 4.5, difference: Difference = BETTER) -> Comparison:
    return Comparison(name, bits, kl, difference, {"books": difference, "code": difference})


def held(name: str, bits: float, kl: float, digest: str, **changes: Any) -> HeldoutRow:
    domains = {"books": DomainScore(4, 0.9 * kl, 0.1 * kl), "code": DomainScore(2, 1.2 * kl, None)}
    row = HeldoutRow(
        name=name,
        trial=None,
        digest=digest,
        bits_per_weight=bits,
        checkpoint_bytes=500_000,
        kl=kl,
        kl_stderr=0.1 * kl,
        same_top=0.9,
        perplexity=50.0,
        domains=domains,
        rival=None,
        replaced_by=None,
        is_within_budget=True,
        is_published=False,
        reason="compared with only",
    )
    return replace(row, **changes)


def trial(found: SearchResult, origin: str) -> int:
    return next(row.number for row in found.rows if row.origin == origin)


@pytest.fixture
def judged(found: SearchResult) -> SearchResult:
    """The finished search with a gate whose numbers the tests below know.

    int3-g32 is a point and stays; the second point is withheld for int3-g32; the default knobs
    are best; the last point, above the budget, gives its place to int4-g32.
    """
    inventory, rows = found.space.inventory, found.rows
    int3, best = trial(found, "uniform:int3-g32"), trial(found, "knobs")
    others = [r.number for r in found.front_trials if r.number not in (int3, best)]
    low, high = others[0], others[-1]
    digests = {n: uniform_assignment(inventory, n).digest for n in ("int4-g32", "mxfp4")}
    table = (
        held("int3-g32", 3.5, 0.2, rows[int3].digest, trial=int3, is_published=True),
        held("mxfp4", 4.25, 0.0045, digests["mxfp4"]),
        held("int4-g32", 4.5, 0.004, digests["int4-g32"], is_published=True),
        held(
            f"trial-{low:03d}",
            4.6,
            0.3,
            rows[low].digest,
            trial=low,
            rival=beside("int4-g32", 0.004),
            replaced_by=beside("int3-g32", 0.2, 3.5, Difference(-0.1, 0.01, -0.12, -0.08)),
        ),
        held(
            f"trial-{best:03d}",
            5.1,
            0.001,
            rows[best].digest,
            trial=best,
            rival=beside("int4-g32", 0.004),
            is_published=True,
        ),
        held(
            f"trial-{high:03d}",
            7.0,
            0.0005,
            rows[high].digest,
            trial=high,
            rival=beside("int4-g32", 0.004),
            is_published=True,
            is_within_budget=False,
        ),
    )
    published = found.folder.load_assignment(rows[best].digest)
    return replace(
        found,
        gate=GateResult(table, f"trial-{best:03d}", "search", published, f"trial-{best:03d}"),
    )


def with_row(result: SearchResult, name: str, **changes: Any) -> SearchResult:
    rows = [replace(r, **changes) if r.name == name else r for r in result.gate.rows]
    return replace(result, gate=replace(result.gate, rows=tuple(rows)))


def with_best(result: SearchResult, **changes: Any) -> SearchResult:
    return with_row(result, result.gate.best_name, **changes)


def cells(table: str, name: str) -> list[str]:
    """The cells of the line of a Markdown table that starts with a name."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


# The winner


def test_winner_is_compared_with_its_rival_and_has_an_interval(judged: SearchResult) -> None:
    assert winner_text(judged) == (
        "held-out KL 0.001000 +- 0.000100: 0.250 x uniform int4-g32 (0.004000 at 4.500 bits), "
        "paired difference 0.001000 +- 0.000100, 95 % interval 0.000800 to 0.001200"
    )


def test_rival_outside_the_menu_is_named_as_such(judged: SearchResult) -> None:
    result = with_best(judged, rival=beside("mxfp4", 0.0045, 4.25))
    assert "uniform mxfp4 (0.004500 at 4.250 bits, which is not in --formats)" in winner_text(
        result
    )


def test_uniform_winner_is_said_in_report_and_summary(judged: SearchResult) -> None:
    published = uniform_assignment(judged.space.inventory, "int4-g32")
    worse = beside("int4-g32", 0.004, difference=Difference(-0.001, 0.0002, -0.002, -0.0005))
    result = with_best(judged, kl=0.005, replaced_by=worse, is_published=False)
    gate = replace(result.gate, winner="int4-g32", published=published)
    result = replace(result, gate=gate)
    assert headline(result).claim.endswith(
        "closer to the original than uniform int4-g32 beyond noise"
    )
    text = (
        "best.json is uniform int4-g32: on held-out text the 0.005000 +- 0.000100 of the best "
        "trial is not below its KL of 0.004000 +- 0.000400 beyond noise (paired difference "
        "-0.001000 +- 0.000200, 95 % interval -0.002000 to -0.000500)"
    )
    assert text in report_text(result)
    assert text in summary_text(result).replace("\n", " ")
    best = front_json(result)["best"]
    assert (best["winner"], best["bits_per_weight"]) == ("int4-g32", 4.5)


def test_best_trial_that_is_uniform_is_said(judged: SearchResult) -> None:
    gate = replace(judged.gate, winner="int4-g32", best_name="int4-g32")
    text = winner_text(replace(judged, gate=gate))
    assert "best.json is uniform int4-g32, held-out KL 0.004000 +- 0.000400: that is the" in text


def test_budget_below_all_uniform_formats_is_said(judged: SearchResult) -> None:
    result = with_best(judged, rival=None)
    assert "nothing to beat" in winner_text(result)
    assert domain_text(result).splitlines()[0] == "| domain | windows | KL |"


def test_perfect_rival_gives_no_ratio(judged: SearchResult) -> None:
    result = with_best(judged, rival=beside("int4-g32", 0.0))
    assert "beside uniform int4-g32" in winner_text(result)
    perfect = {"books": DomainScore(4, 0.0, 0.0), "code": DomainScore(2, 0.0, None)}
    assert "Worst domain" not in domain_text(with_row(result, "int4-g32", domains=perfect))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"kl": 0.00036}, "11 times closer to the original than", id="many times"),
        pytest.param({}, "4.0 times closer to the original than", id="times"),
        pytest.param({"kl": 0.0038}, "5.3 % closer to the original than", id="percent"),
        pytest.param({"kl": 0.0}, "closer to the original than", id="equal to the original"),
    ],
)
def test_headline_says_how_many_times_closer_at_which_size(
    judged: SearchResult, changes: Mapping[str, Any], said: str
) -> None:
    result = replace(with_best(judged, **changes), original_perplexity=49.966)
    assert headline(result).claim == f"{said} uniform int4-g32 at the same bytes"
    assert headline(result).perplexity == "perplexity 49.97 -> 50.00"
    megabytes = result.bf16_bytes / 1e6
    assert headline(result).size == f"0.50 MB of {megabytes:.2f} MB in bf16"
    (text,) = {headline(result).text, front_json(result)["headline"]}
    assert text.capitalize()[:40] in report_text(result)
    assert text in " ".join(summary_text(result).split())
    assert "perplexity" not in headline(replace(result, original_perplexity=None)).text


def test_headline_claims_nothing_that_the_noise_does_not_let(judged: SearchResult) -> None:
    def claim(low: float, high: float, **changes: Any) -> str:
        rival = beside("int4-g32", 0.0005, difference=Difference(0.0, 0.1, low, high))
        return headline(with_best(judged, rival=rival, **changes)).claim

    assert claim(-0.1, 0.1).startswith("as close to the original, within noise, as uniform int4")
    assert claim(-0.2, -0.1).startswith("2.0 times farther from the original than uniform int4")
    assert claim(-0.2, -0.1, checkpoint_bytes=450_000).endswith("in 10.0 % fewer bytes")
    assert claim(-0.2, -0.1, checkpoint_bytes=510_000).endswith("in 2.0 % more bytes")
    assert "where no uniform format fits" in headline(with_best(judged, rival=None)).claim


# Tables


def test_published_points_stand_beside_uniform_of_their_size(judged: SearchResult) -> None:
    table, name = published_table(judged), judged.gate.best_name
    assert len(table.splitlines()) == 2 + 4
    row = cells(table, f"{name} (best.json)")
    assert row[1:] == [
        *("0.001000 +- 0.000100", "5.1000", "0.50", "int4-g32", "0.004000"),
        *("0.001000", "0.000800 to 0.001200"),
    ]
    assert cells(table, "int3-g32")[4] == "none"
    files = files_table(judged)
    assert cells(files, name)[1:4] == [f"configs/{name}.json", "knobs", "500000"]
    assert cells(files, "int4-g32")[1:3] == ["configs/uniform-int4-g32.json", "uniform:int4-g32"]
    high = judged.gate.rows[-1]
    assert cells(table, high.name)[0] == f"{high.name} (above the budget)"


def test_withheld_point_is_listed_with_what_takes_its_place(judged: SearchResult) -> None:
    (withheld,) = judged.gate.withheld
    assert cells(withheld_text(judged), withheld.name) == [
        *(withheld.name, "4.6000", "0.300000 +- 0.030000", "int3-g32", "0.200000"),
        *("-0.100000", "-0.120000 to -0.080000", withheld.reason),
    ]
    assert "withheld, not better beyond noise: 1;" in summary_text(judged)
    kept = with_row(judged, withheld.name, replaced_by=None, is_published=True)
    assert withheld_text(kept).startswith("None")
    assert "withheld" not in summary_text(kept)


def test_uniform_formats_that_take_no_place_are_shown(judged: SearchResult) -> None:
    table = uniform_table(judged)
    assert len(table.splitlines()) == 3
    assert cells(table, "mxfp4")[1:] == [
        *("4.2500", "0.004500 +- 0.000450", "90.00 %", "50.000", "no"),
    ]


def test_domains_are_compared_and_the_worst_is_named(judged: SearchResult) -> None:
    best = replace(judged.gate.best.domains["code"], kl=0.0036)
    domains = {**judged.gate.best.domains, "code": best}
    text = domain_text(with_best(judged, domains=domains))
    assert cells(text, "books") == [
        *("books", "4", "0.000900 +- 0.000100", "0.003600", "0.001000", "0.000800 to 0.001200"),
    ]
    assert cells(text, "code")[:4] == ["code", "2", "0.003600", "0.004800"]
    assert "Worst domain beside uniform int4-g32: code, with 0.750 x its KL." in text


def test_a_single_domain_is_not_called_the_worst(judged: SearchResult) -> None:
    books = {"books": judged.gate.best.domains["books"]}
    assert "Worst" not in domain_text(with_best(judged, domains=books))


def test_domain_of_one_window_has_no_interval(judged: SearchResult) -> None:
    single = Difference(0.002, None, None, None)
    rival = judged.gate.best.rival
    assert rival is not None
    rival = replace(rival, domains={**rival.domains, "code": single})
    assert cells(domain_text(with_best(judged, rival=rival)), "code")[4:] == [
        *("0.002000", "of one window"),
    ]


def test_gains_count_what_is_within_the_budget(judged: SearchResult) -> None:
    limit = judged.limit
    first = judged.rows[0]
    rows = (
        replace(first, origin="uniform:int4-g32", kl=0.4, bits_per_weight=limit),
        replace(first, origin="knobs", kl=0.1, bits_per_weight=limit),
        replace(first, origin="size", kl=0.01, bits_per_weight=limit + 0.1),
    )
    table = gains_table(replace(judged, rows=rows))
    assert cells(table, "uniform") == ["uniform", "1", "0.400000", ""]
    assert cells(table, "default knobs") == ["default knobs", "1", "0.100000", "0.250"]
    assert cells(table, "size") == ["size", "1", "0.100000", "1.000"]


@pytest.mark.parametrize(
    ("spearman", "is_trusted"),
    [
        pytest.param({"default": 0.61, "error": 0.2}, True, id="good"),
        pytest.param({"default": 0.59, "error": 0.9}, False, id="bad"),
        pytest.param({"default": math.nan}, False, id="constant"),
    ],
)
def test_costs_that_do_not_rank_are_said_not_to_be_trusted(
    spearman: Mapping[str, float], is_trusted: bool, judged: SearchResult
) -> None:
    text = costs_text(replace(judged, probe=Probe(30, 16, spearman)))
    assert "over 30 random assignments within the budget, 16 windows each" in text
    assert ("not to be trusted" in text) is not is_trusted
    for name, value in spearman.items():
        assert cells(text, name)[1] == ("not defined" if math.isnan(value) else f"{value:.3f}")


def test_search_without_a_probe_says_so_and_its_json_is_valid(judged: SearchResult) -> None:
    result = replace(judged, probe=None)
    assert costs_text(result) == "Not measured in this search."
    assert front_json(result)["probe"] is None
    nothing = replace(judged, probe=Probe(3, 2, {"default": math.nan, "error": 0.5}))
    assert front_json(nothing)["probe"]["spearman"] == {"default": None, "error": 0.5}


def test_work_and_certificate_are_told(judged: SearchResult) -> None:
    rows = [replace(row, gap=None, duplicate_of=None) for row in judged.rows[:4]]
    rows[1] = replace(rows[1], gap=2e-4, is_pruned=True)
    rows[2] = replace(rows[2], gap=1e-5, duplicate_of=0)
    text = search_text(replace(judged, rows=tuple(rows), n_measured=77, n_passes=12.34))
    assert text.startswith(f"Stopped after 4 trials: {judged.stopped}.")
    assert "4 trials, of which 1 ended early and 1 repeat another one; 77 assignments" in text
    assert "in 12.3 full passes over the evaluation text; 6 on held-out text" in text
    assert text.endswith("of its own costs: 2.00e-04.")
    assert "none was solved" in search_text(replace(judged, rows=(rows[0],)))


def test_rare_experts_are_listed(judged: SearchResult) -> None:
    counts = {"x.experts": [100, 24, 276, 0]}
    rare = tuple(f"x.experts.{i}" for i in range(9))
    facts = replace(judged.provenance, calibration_tokens_per_expert=counts, rare_matrices=rare)
    text = coverage_text(replace(judged, provenance=facts))
    assert "| x.experts | 400 | 0 | 276 | 1, 3 |" in text
    assert "9 matrices were reached by fewer than 64 tokens" in text
    assert "x.experts.7, ...." in text and "x.experts.8" not in text
    none_rare = replace(facts, rare_matrices=())
    assert "reached by 64 tokens or more" in coverage_text(replace(judged, provenance=none_rare))
    dense = replace(judged.provenance, calibration_tokens_per_expert={})
    assert "No routed experts" in coverage_text(replace(judged, provenance=dense))


def test_report_has_every_section(judged: SearchResult) -> None:
    text = report_text(judged)
    parts = (winner_text, published_table, withheld_text, domain_text, uniform_table, gains_table)
    for part in (*parts, costs_text, search_text, coverage_text):
        assert part(judged) in text


# What is printed


def test_three_bit_counts() -> None:
    counts = BitCount(4.0, 4.25, 6.0, 500, 1000)
    assert bit_lines(counts) == [
        "routed experts   4.0000 bits per weight",
        "all quantizable  4.2500 bits per weight, 500 bytes",
        "whole checkpoint 6.0000 bits per weight, 1000 bytes",
    ]
    assert bit_lines(replace(counts, routed_bits_per_weight=None))[0] == "routed experts   none"


def test_summary_marks_the_best_and_what_is_above_the_budget(judged: SearchResult) -> None:
    head, columns, *lines = summary_text(judged).splitlines()
    assert "(held-out text; * best, ^ above the budget)" in head
    assert columns.split() == [
        *("trial", "bits", "MB", "KL", "+-", "stderr", "uniform", "its", "KL", "same", "top"),
        "from",
    ]
    best, high = judged.gate.best.trial, judged.gate.rows[-1].trial
    assert [line.split()[0] for line in lines[:4]] == ["0", "-", f"*{best}", f"^{high}"]
    assert lines[2].split()[1:] == [
        *("5.100", "0.50", "0.001000", "+-", "0.000100", "int4-g32", "0.004000", "90.00", "%"),
        "knobs",
    ]
    assert lines[1].split()[-1] == "uniform:int4-g32"
    below = with_row(judged, judged.gate.rows[-1].name, is_within_budget=True)
    assert "(held-out text; * best)" in summary_text(below)


def test_summary_fits_100_columns(judged: SearchResult) -> None:
    lines = summary_text(judged).splitlines()
    paths = [
        line
        for line in lines
        if str(judged.folder.path) in line or judged.spec.checkpoint.model in line
    ]
    assert all(len(line) <= 100 for line in lines if line not in paths)


def test_line_of_a_trial(found: SearchResult) -> None:
    row = replace(
        found.rows[0], number=4, kl=0.002, kl_stderr=0.0005, bits_per_weight=4.25, seconds=1.26
    )
    assert trial_line(row) == (
        "trial 4: uniform:int3-g32, 4.250 bits, KL 0.002000 +- 0.000500, 1.3 s"
    )
    assert trial_note(row) == "0.002000 at 4.25 bits"
    assert "uniform:int3-g32 = trial 2," in trial_line(replace(row, duplicate_of=2))
    early = replace(row, is_pruned=True, kl_per_window=(0.001, 0.003))
    assert "+- 0.000500 after 2 windows, 1.3 s" in trial_line(early)


# Files


def test_only_published_points_have_configurations(judged: SearchResult, tmp_path: Any) -> None:
    folder = RunFolder(tmp_path)
    for row in judged.rows:
        folder.save_assignment(judged.folder.load_assignment(row.digest))
    for old in ("trial-999", "uniform-int2-g64", "mine"):
        folder.write_text(f"configs/{old}.json", "old")
    result = replace(judged, folder=folder)
    write_configs(result)
    best, high = judged.gate.best_name, judged.gate.rows[-1].name
    assert {p.stem for p in (tmp_path / "configs").iterdir()} == {
        *("trial-000", "uniform-int4-g32", best, high, "mine")
    }
    for point in result.gate.points:
        config = load_config(tmp_path / config_name(point))
        resolved = resolve(config, result.space.inventory, strict=True)
        assert resolved.assignment.digest == point.digest
    published = (tmp_path / "configs" / f"{best}.json").read_bytes()
    assert (tmp_path / "best.json").read_bytes() == published


def test_configuration_carries_its_trial_and_its_held_out_row(judged: SearchResult) -> None:
    row = judged.gate.best
    summary = json.loads(config_text(judged, row))["summary"]
    assert row.trial is not None
    measured = judged.rows[row.trial]
    assert (summary["trial"], summary["origin"]) == (row.trial, "knobs")
    assert [s["value"] for s in summary["scores"]] == [
        *(measured.kl, measured.same_top, measured.perplexity),
    ]
    (heldout,) = summary["heldout"]
    assert (heldout["kl"], heldout["rival"]["name"]) == (0.001, "int4-g32")
    assert heldout["rival"]["difference"]["high"] == 0.0012
    assert heldout["domains"]["code"]["n_windows"] == 2


def test_configuration_of_a_uniform_format_that_was_no_trial(judged: SearchResult) -> None:
    row = replace(
        judged.gate.row("int4-g32"),
        name="int8-row",
        digest=uniform_assignment(judged.space.inventory, "int8-row").digest,
    )
    summary = json.loads(config_text(judged, row))["summary"]
    assert (summary["trial"], summary["origin"]) == (None, "uniform:int8-row")
    assert (summary["scores"], summary["assignment_digest"]) == ([], row.digest)


def test_configuration_never_carries_the_numbers_of_a_trial_that_ended_early(
    judged: SearchResult,
) -> None:
    row = judged.gate.row("int4-g32")
    early = [replace(r, is_pruned=r.digest == row.digest) for r in judged.rows]
    summary = json.loads(config_text(replace(judged, rows=tuple(early)), row))["summary"]
    assert summary["scores"] == []


def test_why_best_json_is_the_one_is_said_on_screen_in_the_report_and_in_the_file(
    judged: SearchResult,
) -> None:
    row = judged.gate.row(judged.gate.best_name)
    (why,) = {why_text(judged), front_json(judged)["best"]["why"]}
    assert why.startswith(f"trial {judged.best.number} ")
    assert f"Why this one: {why}." in report_text(judged)
    assert f"why: {why}" in " ".join(summary_text(judged).split())
    if row.digest == judged.published.digest:
        assert json.loads(config_text(judged, row))["summary"]["why"] == why
    other = replace(judged, gate=replace(judged.gate, first_name="trial-999"))
    assert why_text(other).startswith("the evaluation text chose trial-999; on held-out text")
    lower = with_row(judged, judged.gate.rows[3].name, kl=0.0009)
    assert f"; {judged.gate.rows[3].name} has a lower KL on held-out text (0.0009" in why_text(
        lower
    )
    uniform = replace(judged, gate=replace(judged.gate, winner="int4-g32"))
    assert "no point within the budget is better than uniform int4-g32" in why_text(uniform)


@pytest.mark.parametrize("width", [50, 60, 80])
def test_front_on_a_narrow_screen_leaves_columns_out_and_wraps_nothing(
    judged: SearchResult, width: int
) -> None:
    lines = summary_text(judged, width).splitlines()
    table = lines[1 : 2 + len(judged.gate.points)]
    assert all(len(line) <= width for line in table)
    assert table[0].split()[:2] == ["trial", "bits"]
    assert "KL +- stderr" in table[0]
    for line, row in zip(table[1:], judged.gate.points, strict=True):
        assert f"{row.kl:.6f} +- {row.kl_stderr:.6f}" in line


def test_commands_to_copy_are_quoted_everywhere(judged: SearchResult) -> None:
    model = "a 'model' $(touch x)"
    result = replace(judged, spec=replaced(judged.spec, model=model))
    shown = [summary_text(result), report_text(result), study_note(result.spec, ("int4-g32",))]
    for text in shown:
        commands = [line for line in text.splitlines() if "aq-quantize --model" in line]
        assert commands
        for line in commands:
            assert shlex.split(line.removeprefix("next: "))[:3] == [
                "aq-quantize",
                "--model",
                model,
            ]


def test_front_json_has_points_withheld_and_the_work(judged: SearchResult) -> None:
    result = replace(judged, n_measured=77, n_passes=12.3456)
    front = json.loads(json.dumps(front_json(result), allow_nan=False))
    assert front["version"] == 2
    assert [p["name"] for p in front["front"]] == [r.name for r in judged.gate.points]
    assert [p["config"] for p in front["front"]] == [config_name(r) for r in judged.gate.points]
    by_name = {p["name"]: p for p in front["front"]}
    best = by_name[judged.gate.best_name]
    assert best["evaluation"]["number"] == judged.gate.best.trial
    assert best["heldout"]["kl"] == 0.001
    assert front["withheld"] == [r.name for r in judged.gate.withheld]
    assert [r["name"] for r in front["heldout"]] == [r.name for r in judged.gate.rows]
    assert (front["n_measured"], front["n_passes"]) == (77, 12.346)
    assert front["best"]["searched"] == judged.gate.best_name
    assert front["stages"][0]["stage"] == "uniform"


def test_trials_table_keeps_whole_numbers_whole_and_says_what_is_published(
    judged: SearchResult,
) -> None:
    rows = (*judged.rows[:2], replace(judged.rows[1], number=2, duplicate_of=1))
    text = trials_frame(replace(judged, rows=rows)).to_csv(index=False)
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["duplicate_of"] for row in table] == ["", "", "1"]
    assert [float(row["kl"]) for row in table] == [row.kl for row in rows]
    assert "kl_per_window" not in table[0]
    published = {row.trial for row in judged.gate.points}
    assert [row["is_published"] == "True" for row in table] == [n in published for n in range(3)]


def test_files_of_a_report_are_written(judged: SearchResult, tmp_path: Any) -> None:
    write_report(replace(judged, folder=RunFolder(tmp_path)))
    names = {"front.json", "trials.csv", "report.md", "report.html"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "front.json").read_text())["n_trials"] == len(judged.rows)

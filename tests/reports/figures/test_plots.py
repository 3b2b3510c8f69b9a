"""Figures show the numbers of front.json, and stay whole for results that have little to show."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from alphaquant.reports.figures.bitmaps import bits_by_expert, bits_by_role
from alphaquant.reports.figures.plots import PUBLISHED, figures, interval_half, is_uniform
from alphaquant.reports.figures.style import log_scale
from alphaquant.reports.report import front_json
from alphaquant.studies.program import rank_correlation
from alphaquant.studies.result import Probe, SearchResult


def trace(figure: go.Figure, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def names(figure: go.Figure) -> list[str]:
    return [t.name for t in figure.data]


def points(figure: go.Figure, groups: Sequence[str]) -> list[tuple[float, float]]:
    """(x, y) of all points of these groups."""
    return [
        at
        for t in figure.data
        if t.name in groups and t.mode == "markers"
        for at in zip(t.x, t.y, strict=True)
    ]


TRIALS = ("ended early", "uniform trials", "allocators", "searched")


@pytest.fixture
def lone(found: SearchResult) -> SearchResult:
    """One trial, which is published; nothing uniform beside it."""
    best = next(row for row in found.gate.points if row.digest == found.published.digest)
    assert best.trial is not None
    alone = replace(best, rival=None, trial=0, name="trial-000")
    gate = replace(found.gate, rows=(alone,), best_name="trial-000")
    return replace(found, rows=(replace(found.rows[best.trial], number=0),), gate=gate, probe=None)


def test_the_figures_are_named_and_ordered(found: SearchResult) -> None:
    assert list(figures(found)) == ["front", "trials", "layers", "experts", "costs", "stages"]


def test_published_points_are_those_of_front_json(found: SearchResult) -> None:
    front, points_of = figures(found)["front"], front_json(found)["front"]
    drawn = trace(front, PUBLISHED)
    assert list(drawn.x) == [p["heldout"]["bits_per_weight"] for p in points_of]
    assert list(drawn.y) == [p["heldout"]["kl"] for p in points_of]
    assert list(drawn.customdata) == [p["config"] for p in points_of]
    for text, point in zip(drawn.hovertext, points_of, strict=True):
        assert f"{point['heldout']['checkpoint_bytes']} bytes" in text
        assert f"from {point['origin']}" in text
        assert point["config"] in text
    best = trace(front, "best.json")
    assert list(best.x) == [front_json(found)["best"]["bits_per_weight"]]


def test_every_row_of_the_gate_is_drawn_once_on_held_out_text(long: SearchResult) -> None:
    front = figures(long)["front"]
    drawn = points(front, ("uniform formats", "withheld", PUBLISHED))
    rows = front_json(long)["heldout"]
    assert sorted(drawn) == sorted((r["bits_per_weight"], r["kl"]) for r in rows)


def test_every_trial_is_drawn_once_on_evaluation_text(long: SearchResult) -> None:
    front = figures(long)["trials"]
    assert sorted(points(front, TRIALS)) == sorted((r.bits_per_weight, r.kl) for r in long.rows)
    pruned = [(r.bits_per_weight, r.kl) for r in long.rows if r.is_pruned]
    assert pruned and sorted(points(front, ("ended early",))) == sorted(pruned)


def test_the_two_texts_have_figures_of_their_own(long: SearchResult) -> None:
    shown = figures(long)
    held = {"best uniform of at most the size", "uniform formats", "withheld", PUBLISHED}
    assert set(names(shown["front"])) <= held | {"best.json", "names"}
    assert set(names(shown["trials"])) <= {*TRIALS, "front of the trials"}


def test_the_best_and_its_rival_are_named_beside_their_points(found: SearchResult) -> None:
    named, best = trace(figures(found)["front"], "names"), found.gate.published_row
    assert best.rival is not None
    assert [text.replace("\N{NO-BREAK SPACE}", "") for text in named.text] == [
        *("<b>best.json</b>", f"uniform<br>{best.rival.name}")
    ]
    assert list(named.y) == [best.kl, best.rival.kl]


def test_intervals_are_students_for_the_windows_of_the_text(found: SearchResult) -> None:
    row = found.gate.best
    assert sum(d.n_windows for d in row.domains.values()) == 6
    assert interval_half(row) == pytest.approx(2.5706 * row.kl_stderr, rel=1e-4)
    drawn = trace(figures(found)["front"], PUBLISHED)
    assert drawn.error_y.array[0] == interval_half(found.gate.points[0])


def test_the_staircase_is_the_lowest_uniform_of_at_most_the_size(found: SearchResult) -> None:
    uniform = [row for row in found.gate.rows if is_uniform(row)]
    worse = replace(
        uniform[-1], name="int9", bits_per_weight=9.0, kl=2 * uniform[0].kl, trial=None
    )
    gate = replace(found.gate, rows=(*found.gate.rows, worse))
    front = figures(replace(found, gate=gate))["front"]
    stairs = trace(front, "best uniform of at most the size")
    assert 9.0 not in stairs.x
    for x, y in zip(stairs.x, stairs.y, strict=True):
        assert y == min(row.kl for row in uniform if row.bits_per_weight <= x)
    assert stairs.y[-1] == min(row.kl for row in uniform)
    assert stairs.line.shape == "hv"


def test_withheld_points_are_drawn_and_offer_no_configuration(found: SearchResult) -> None:
    first = next(r for r in found.gate.rows if not is_uniform(r) and r.rival is not None)
    taken = replace(first, is_published=False, replaced_by=first.rival)
    others = [r for r in found.gate.rows if r is not first]
    gate = replace(found.gate, rows=(*others, taken))
    drawn = trace(figures(replace(found, gate=gate))["front"], "withheld")
    withheld = [(row.bits_per_weight, row.kl) for row in (*found.gate.withheld, taken)]
    assert sorted(zip(drawn.x, drawn.y, strict=True)) == sorted(withheld)
    assert set(drawn.customdata) == {None}


def test_the_budget_is_a_line_on_both_texts(found: SearchResult) -> None:
    for name in ("front", "trials"):
        (line,) = figures(found)[name].layout.shapes
        assert (line.x0, line.x1) == (found.limit, found.limit)


def test_maps_are_the_bits_and_tokens_of_best_json(found: SearchResult) -> None:
    shown, inventory = figures(found), found.space.inventory
    roles = bits_by_role(found.published, inventory)
    experts = bits_by_expert(found.published, inventory)
    assert experts is not None
    layers = shown["layers"].data[0]
    assert [list(row) for row in layers.z] == roles.values.tolist()
    assert list(layers.x) == list(roles.columns)
    bits, tokens = shown["experts"].data
    assert [list(row) for row in bits.z] == experts.values.tolist()
    assert layers.texttemplate == "%{z:.2f}" and bits.texttemplate == "%{z:.2f}"
    assert tokens.texttemplate == "%{z:,.0f}"  # counts have no decimals
    counts = found.provenance.calibration_tokens_per_expert.values()
    assert [list(row) for row in tokens.z] == [list(map(float, row)) for row in counts]


def test_a_model_without_routed_experts_has_no_figure_of_experts(found: SearchResult) -> None:
    space = found.space
    dense = tuple(m for m in space.inventory.matrices if m.expert is None)
    inventory = replace(space.inventory, matrices=dense)
    facts = replace(found.provenance, calibration_tokens_per_expert={})
    result = replace(found, space=replace(space, inventory=inventory), provenance=facts)
    assert list(figures(result)) == ["front", "trials", "layers", "costs", "stages"]


def test_costs_are_predicted_against_measured_with_both_correlations(found: SearchResult) -> None:
    probe = Probe(16, 6, {"default": 0.8125, "fisher": 0.5})
    costs = figures(replace(found, probe=probe))["costs"]
    pairs = sorted((r.predicted_kl, r.kl) for r in found.rows)
    assert sorted(points(costs, TRIALS)) == pairs
    title = costs.layout.title.text
    rho = rank_correlation(*zip(*pairs, strict=True))
    assert f"of {len(found.rows)} complete trials: {rho:.3f}" in title
    assert "of 16 random assignments (default costs): 0.812,<br>95 % interval 0." in title
    assert "too few" not in title.partition("<br>of 16")[2]
    few = figures(replace(found, probe=Probe(6, 6, {"default": 0.8})))["costs"].layout.title.text
    assert few.endswith(":<br>6 are too few to judge costs by")


def test_correlations_that_are_not_defined_are_said_to_be(lone: SearchResult) -> None:
    probe = Probe(16, 6, {"default": math.nan})
    title = figures(replace(lone, probe=probe))["costs"].layout.title.text
    assert title.count("not defined") == 2


def test_stages_are_those_of_front_json(found: SearchResult) -> None:
    drawn, stages = figures(found)["stages"].data[0], front_json(found)["stages"]
    assert list(drawn.y) == [s["stage"] for s in stages]
    assert list(drawn.x) == [s["kl"] for s in stages]
    assert list(drawn.text[1:]) == [f"x {s['ratio']:.3f}" for s in stages[1:]]


def test_one_trial_and_no_uniform_make_whole_figures(lone: SearchResult) -> None:
    shown = figures(lone)
    assert len(trace(shown["front"], PUBLISHED).x) == 1
    assert list(trace(shown["front"], "best uniform of at most the size").x) == []
    assert len(shown["stages"].data[0].x) == 1


def test_a_divergence_of_zero_is_drawn_at_the_lower_edge_and_said_to_be_zero(
    lone: SearchResult,
) -> None:
    (row,) = lone.gate.rows
    gate = replace(lone.gate, rows=(replace(row, kl=0.0, kl_stderr=0.0),))
    trial = replace(lone.rows[0], kl=0.0, predicted_kl=0.0)
    shown = figures(replace(lone, gate=gate, rows=(trial,)))
    drawn = trace(shown["front"], PUBLISHED)
    assert drawn.y[0] > 0 and "KL 0.000000 +-" in drawn.hovertext[0]
    assert names(shown["costs"]) == ["searched"]  # no line where nothing is above 0
    assert all(x > 0 for x in shown["stages"].data[0].x)


def test_a_model_that_broke_down_is_nowhere_on_the_axis(found: SearchResult) -> None:
    first, *rest = found.rows
    shown = figures(replace(found, rows=(replace(first, kl=math.inf), *rest)))
    (drawn,) = [at for at in points(shown["costs"], TRIALS) if at[1] is None]
    assert drawn[0] == first.predicted_kl


def test_error_bars_never_reach_below_the_axis() -> None:
    scale = log_scale([0.0, 0.3, 0.6, math.inf, math.nan])
    assert scale.floor == scale.low == pytest.approx(0.1)
    assert log_scale([0.3, 0.6]).low == 0.3
    assert scale.place(0.0) == scale.floor and scale.place(0.3) == 0.3
    assert scale.place(math.inf) is None and scale.place(math.nan) is None
    assert scale.below(0.3, 0.1) == 0.1
    assert scale.below(0.3, 9.0) == pytest.approx(0.2)
    assert scale.below(scale.floor, 9.0) == 0.0


@pytest.mark.parametrize(
    ("values", "few"),
    [
        pytest.param([0.0039, 0.0046], ["0.0038", "0.004", "0.0042", "0.0044"], id="close"),
        pytest.param([2.01e-5, 2.04e-5], ["2.01e-5", "2.02e-5", "2.03e-5"], id="close and small"),
        pytest.param([0.003, 0.02], ["0.001", "0.002", "0.005", "0.01", "0.02"], id="narrow"),
        pytest.param([3e-5, 1.0], ["1e-5", "0.0001", "0.001", "0.01", "0.1", "1"], id="wide"),
    ],
)
def test_ticks_are_plain_numbers(values: list[float], few: list[str]) -> None:
    axis = log_scale(values).axis("KL")
    texts = axis["ticktext"]
    assert isinstance(texts, list)
    first = texts.index(few[0])
    assert texts[first : first + len(few)] == few

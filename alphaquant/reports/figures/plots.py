"""The figures of a search, from the same `SearchResult` as its tables.

Divergence is on logarithmic axes. Numbers of the evaluation text, which the search saw, and of the
held-out text, which it did not, are never on one axis.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from scipy.stats import t as student

from alphaquant.reports.cautions import correlation_caution, rho_interval_text, rho_text
from alphaquant.reports.figures.maps import experts_figure, layers_figure
from alphaquant.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    LogScale,
    laid_out,
    log_scale,
    styled,
)
from alphaquant.reports.front import config_name, origin_of
from alphaquant.reports.tables import with_error
from alphaquant.studies.gate.intervals import LEVEL
from alphaquant.studies.gate.judge import HeldoutRow
from alphaquant.studies.program import rank_correlation
from alphaquant.studies.result import SearchResult, stage_gains
from alphaquant.studies.store.study import TrialRow
from alphaquant.studies.trials import ALLOCATOR, UNIFORM

PUBLISHED = "published"
"""Name of the points that have a configuration; their `customdata` is its file."""

_LOG_KL = "KL, nats per token"
_SIZES_PIXELS = 430
_TITLE_PIXELS = 18
_GAP = "\N{NO-BREAK SPACE}" * 4
"""Between a point and its name."""


@dataclass(frozen=True)
class _Look:
    """How a group of points is drawn."""

    name: str
    colour: str
    symbol: str
    size: int = 8


_EVALUATED: tuple[tuple[_Look, Callable[[TrialRow], bool]], ...] = (
    (_Look("ended early", GREY, "x-thin-open", 7), lambda row: row.is_pruned),
    (
        _Look("uniform trials", ORANGE, "square-open", 7),
        lambda row: row.origin.startswith(UNIFORM),
    ),
    (_Look("allocators", PURPLE, "diamond"), lambda row: row.origin.startswith(ALLOCATOR)),
    (_Look("searched", BLUE, "circle-open"), lambda row: True),
)
"""Groups of trials; a trial is in the first that has it."""


def figures(result: SearchResult) -> dict[str, go.Figure]:
    """`front`, `trials`, `layers`, `experts` (where a model has some), `costs` and `stages`."""
    found = {
        "front": front_figure(result),
        "trials": trials_figure(result),
        "layers": layers_figure(result),
        "experts": experts_figure(result),
        "costs": costs_figure(result),
        "stages": stages_figure(result),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def front_figure(result: SearchResult) -> go.Figure:
    """Size against divergence on held-out text: what is published, beside uniform formats."""
    traces = _heldout_traces(result)
    scale = log_scale([row.kl for row in result.gate.rows])
    return _sizes_figure(result, traces, scale, "KL to the original, nats per token")


def trials_figure(result: SearchResult) -> go.Figure:
    """Size against divergence of all trials, on the evaluation text."""
    traces = _evaluated_traces(result)
    return _sizes_figure(result, traces, log_scale([row.kl for row in result.rows]), _LOG_KL)


def _sizes_figure(
    result: SearchResult, traces: Sequence[go.Scatter], scale: LogScale, title: str
) -> go.Figure:
    """Divergence over bits per weight, with the budget as a line."""
    figure = styled(go.Figure(list(traces)), _SIZES_PIXELS)
    place = {"xref": "x", "yref": "y domain"}
    line = {"color": INK, "width": 1, "dash": "dash"}
    budget = {"type": "line", "x0": result.limit, "x1": result.limit, "y0": 0, "y1": 1}
    named = {
        "x": result.limit,
        "y": 1,
        "text": f"budget {result.limit:.3f}",
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "top",
        "xshift": 3,
    }
    layout = {
        "margin": {"t": 12},
        "shapes": [{**budget, **place, "line": line}],
        "annotations": [{**named, "yref": "y domain"}],
    }
    x = {"title": {"text": "stored bits per weight"}}
    return laid_out(figure, layout, x, scale.axis(title))


def costs_figure(result: SearchResult) -> go.Figure:
    """Predicted against measured divergence of all trials, with rank correlations."""
    rows = result.rows
    seen, predicted = log_scale([r.kl for r in rows]), log_scale([r.predicted_kl for r in rows])
    figure = go.Figure()
    for look, inside in _grouped(rows):
        hover = [_trial_hover(row, "evaluation text") for row in inside]
        x = [predicted.place(row.predicted_kl) for row in inside]
        y = [seen.place(row.kl) for row in inside]
        figure.add_trace(_points(look, x, y, hover))
    ends = [v for row in rows for v in (row.kl, row.predicted_kl) if v > 0 and math.isfinite(v)]
    if ends:
        line = {"color": GREY, "width": 1, "dash": "dot"}
        span = [min(ends), max(ends)]
        figure.add_trace(go.Scatter(x=span, y=span, mode="lines", line=line, name="equal"))
    figure = styled(figure, 460)
    said = _correlations(result)
    room = _TITLE_PIXELS * (2 + said.count("<br>"))
    layout = {"margin": {"t": room}, "title": _small_title(said)}
    title = "predicted KL (sum of costs)"
    return laid_out(figure, layout, predicted.axis(title), seen.axis("measured KL"))


def stages_figure(result: SearchResult) -> go.Figure:
    """The lowest divergence within the budget after each stage."""
    gains = stage_gains(result.rows, result.limit)
    shown = [gain for gain in gains if gain.kl is not None]
    scale = log_scale([gain.kl for gain in shown if gain.kl is not None])
    ratios = ["" if gain.ratio is None else f"x {gain.ratio:.3f}" for gain in shown]
    figure = go.Figure(
        go.Scatter(
            x=[scale.place(gain.kl) for gain in shown if gain.kl is not None],
            y=[gain.stage for gain in shown],
            mode="markers+text",
            name="lowest KL",
            text=ratios,
            textposition="middle right",
            cliponaxis=False,
            marker={"size": 10, "color": BLUE},
            hovertext=[f"{g.stage}: {g.kl:.6f} after it, {g.n_trials} trials" for g in shown],
            hoverinfo="text",
        )
    )
    figure = styled(figure, 130 + 34 * len(gains))
    y = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [gain.stage for gain in gains],
        "autorange": "reversed",
    }
    layout = {"showlegend": False, "margin": {"r": 70, "t": 12}}
    return laid_out(figure, layout, scale.axis("lowest KL within the budget"), y)


def interval_half(row: HeldoutRow) -> float:
    """Half the 95 % interval of a row's KL: Student's quantile times the standard error."""
    n_windows = sum(score.n_windows for score in row.domains.values())
    return float(student.ppf((1 + LEVEL) / 2, n_windows - 1)) * row.kl_stderr


def is_uniform(row: HeldoutRow) -> bool:
    """Whether a row of the gate is one format for everything, a point of the front or not."""
    return row.trial is None or row.name != f"trial-{row.trial:03d}"


def _heldout_traces(result: SearchResult) -> list[go.Scatter]:
    """The staircase of uniform formats, then the points by what became of them."""
    rows = result.gate.rows
    scale = log_scale([row.kl for row in rows])
    uniform = [row for row in rows if is_uniform(row)]
    others = [row for row in uniform if not row.is_published]
    groups = (
        (_Look("uniform formats", ORANGE, "square", 7), others),
        (_Look("withheld", RED, "x-thin", 9), result.gate.withheld),
        (_Look(PUBLISHED, BLUE, "circle", 9), result.gate.points),
        (_Look("best.json", GREEN, "star", 16), _best(result)),
    )
    traces = [_staircase(uniform, scale)]
    for look, inside in groups:
        if inside:
            traces.append(_heldout_points(result, look, inside, scale))
    return [*traces, _names(result, scale)]


def _best(result: SearchResult) -> list[HeldoutRow]:
    return [row for row in result.gate.points if result.gate.is_best(row)]


def _names(result: SearchResult, scale: LogScale) -> go.Scatter:
    """What the headline speaks of, named beside its points."""
    best = result.gate.published_row
    named = [(best, "<b>best.json</b>" + _GAP, "middle left")]
    if best.rival is not None:
        rival = result.gate.row(best.rival.name)
        named.append((rival, f"{_GAP}uniform<br>{_GAP}{rival.name}", "top right"))
    return go.Scatter(
        x=[row.bits_per_weight for row, _, _ in named],
        y=[scale.place(row.kl) for row, _, _ in named],
        mode="text",
        name="names",
        text=[text for _, text, _ in named],
        textposition=[position for _, _, position in named],
        textfont={"size": 13, "color": INK},
        hoverinfo="skip",
        showlegend=False,
    )


def _staircase(uniform: Iterable[HeldoutRow], scale: LogScale) -> go.Scatter:
    """The lowest divergence of a uniform format of at most so many bits."""
    x, y, lowest = [], [], math.inf
    for row in sorted(uniform, key=lambda r: (r.bits_per_weight, r.kl)):
        if row.kl < lowest:
            lowest = row.kl
            x.append(row.bits_per_weight)
            y.append(scale.place(row.kl))
    line = {"color": ORANGE, "shape": "hv", "width": 1.5}
    name = "best uniform of at most the size"
    return go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip")


def _heldout_points(
    result: SearchResult, look: _Look, rows: Sequence[HeldoutRow], scale: LogScale
) -> go.Scatter:
    """Points of the held-out text with intervals."""
    y = [scale.place(row.kl) for row in rows]
    half = [interval_half(row) for row in rows]
    trace = _points(
        look,
        [row.bits_per_weight for row in rows],
        y,
        [_heldout_hover(result, row) for row in rows],
    )
    trace.update(
        customdata=[config_name(row) if row.is_published else None for row in rows],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": half,
            "arrayminus": [
                0.0 if at is None else scale.below(at, length)
                for at, length in zip(y, half, strict=True)
            ],
            "thickness": 1,
            "width": 3,
        },
    )
    return trace


def _evaluated_traces(result: SearchResult) -> list[go.Scatter]:
    """All trials by kind, then the line of those that none beats."""
    scale = log_scale([row.kl for row in result.rows])
    traces = [
        _points(
            look,
            [row.bits_per_weight for row in inside],
            [scale.place(row.kl) for row in inside],
            [_trial_hover(row, "evaluation text") for row in inside],
        )
        for look, inside in _grouped(result.rows)
    ]
    front = result.front_trials
    x, y = [r.bits_per_weight for r in front], [scale.place(r.kl) for r in front]
    line = {"color": BLUE, "width": 1, "shape": "hv"}
    name = "front of the trials"
    traces.append(go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"))
    return traces


def _grouped(rows: Iterable[TrialRow]) -> list[tuple[_Look, list[TrialRow]]]:
    """The groups that have a trial."""
    groups: dict[str, list[TrialRow]] = {}
    for row in rows:
        look = next(look for look, has in _EVALUATED if has(row))
        groups.setdefault(look.name, []).append(row)
    return [(look, groups[look.name]) for look, _ in _EVALUATED if look.name in groups]


def _points(
    look: _Look, x: Sequence[float | None], y: Sequence[float | None], hover: Sequence[str]
) -> go.Scatter:
    marker = {"color": look.colour, "symbol": look.symbol, "size": look.size}
    if look.symbol.endswith(("-thin", "-open")):
        marker["line"] = {"color": look.colour, "width": 1.5}
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="markers",
        name=look.name,
        marker=marker,
        hovertext=list(hover),
        hoverinfo="text",
    )


def _heldout_hover(result: SearchResult, row: HeldoutRow) -> str:
    lines = [
        f"<b>{row.name}</b>, held-out text",
        f"{row.bits_per_weight:.4f} bits per weight, {row.checkpoint_bytes} bytes",
        f"KL {with_error(row.kl, row.kl_stderr)}",
    ]
    if row.is_published:
        lines += [f"from {origin_of(result, row)}", config_name(row)]
    return "<br>".join(lines)


def _trial_hover(row: TrialRow, text: str) -> str:
    early = f", first {len(row.kl_per_window)} windows only" if row.is_pruned else ""
    lines = [
        f"<b>trial {row.number}</b>, {text}{early}",
        f"{row.bits_per_weight:.4f} bits per weight, {row.checkpoint_bytes} bytes",
        f"KL {with_error(row.kl, row.kl_stderr)}, predicted {row.predicted_kl:.6f}",
        f"from {row.origin}",
    ]
    return "<br>".join(lines)


def _correlations(result: SearchResult) -> str:
    """The rank correlations, of the trials and of random assignments."""
    rows = [row for row in result.rows if not row.is_pruned]
    rho = rank_correlation([r.predicted_kl for r in rows], [r.kl for r in rows])
    lines = [f"Spearman rho of {len(rows)} complete trials: {_rho(rho, len(rows))}"]
    if result.probe is not None:
        default = result.probe.spearman.get("default", math.nan)
        n = result.probe.n_assignments
        lines.append(f"of {n} random assignments (default costs): {_rho(default, n)}")
    return "<br>".join(lines)


def _rho(value: float, n: int) -> str:
    """A correlation with its interval, and why it says little, in short lines."""
    if math.isnan(value):
        return rho_text(value)
    caution = correlation_caution(value, n)
    found = f"{rho_text(value)},<br>95 % interval {rho_interval_text(value, n)}"
    return found if caution is None else f"{found}:<br>{caution}"


def _small_title(text: str) -> dict[str, object]:
    return {
        "text": text,
        "font": {"size": 13},
        "x": 0,
        "xref": "paper",
        "y": 0.98,
        "yanchor": "top",
    }

"""Heat maps of where a configuration spends its bits, beside where the calibration text went."""

import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from alphaquant.reports.figures.bitmaps import (
    BitMap,
    bits_by_expert,
    bits_by_role,
    tokens_by_expert,
)
from alphaquant.reports.figures.style import laid_out, styled
from alphaquant.studies.result import SearchResult

# Scales of ColorBrewer (Harrower and Brewer, 2003) that are safe with any kind of colour vision.
_BITS_COLOURS = "YlGnBu"
_TOKEN_COLOURS = "Oranges"

_MOST_LABELLED = 10
_MOST_TICKS = 9
"""Numbers of experts below a map, so that they stand upright on a phone."""

_ROW_PIXELS = 26
_LEAST_PIXELS, _MOST_PIXELS = 150, 620


def layers_figure(result: SearchResult) -> go.Figure:
    """Bits of `best.json` by layer and role."""
    bits = bits_by_role(result.published, result.space.inventory)
    heat = _heat(bits, "bits", _BITS_COLOURS, "%{x}<br>%{z:.3f} bits per weight", ".2f")
    figure = go.Figure(heat)
    figure = styled(figure, _pixels(bits) + 108)
    return _labelled(figure, {"margin": {"t": 12}}, {"autotickangles": [0, -40, -90]})


def experts_figure(result: SearchResult) -> go.Figure | None:
    """Bits of `best.json` by layer and expert over the tokens that calibrated them.

    Returns:
        None for a model without routed experts.
    """
    bits = bits_by_expert(result.published, result.space.inventory)
    if bits is None:
        return None
    tokens = tokens_by_expert(result.provenance.calibration_tokens_per_expert)
    maps = [bits] if tokens is None else [bits, tokens]
    names = ["Bits per weight", "Calibration tokens"][: len(maps)]
    pixels = _pixels(bits)
    figure = make_subplots(
        rows=len(maps),
        cols=1,
        subplot_titles=names,
        vertical_spacing=min(0.3, 75 / (len(maps) * pixels + 75)),
    )
    hover = "expert %{x}<br>%{z:.3f} bits per weight"
    figure.add_trace(_heat(bits, "bits", _BITS_COLOURS, hover, ".2f"), 1, 1)
    if tokens is not None:
        hover = "expert %{x}<br>%{z:,.0f} tokens"
        figure.add_trace(_heat(tokens, "tokens", _TOKEN_COLOURS, hover, ",.0f"), 2, 1)
    figure = styled(figure, len(maps) * pixels + 75 + 95)
    _place_bars(figure)
    lowest = "xaxis" if tokens is None else "xaxis2"
    across = {"nticks": _MOST_TICKS, "tickangle": 0}
    return _labelled(figure, {lowest: {"title": {"text": "expert"}}}, across)


def _heat(found: BitMap, name: str, colours: str, shown: str, number: str) -> go.Heatmap:
    """A map; few columns leave room for the numbers in the cells, also on a phone.

    Args:
        found: rows and columns.
        name: of what is counted.
        colours: scale.
        shown: what a cell says under the pointer.
        number: how a cell's number is written, as d3-format says it.
    """
    values = [[None if math.isnan(v) else float(v) for v in row] for row in found.values]
    label = {"texttemplate": f"%{{z:{number}}}"} if len(found.columns) <= _MOST_LABELLED else {}
    return go.Heatmap(
        name=name,
        x=list(found.columns),
        y=list(found.layers),
        z=values,
        colorscale=colours,
        hovertemplate=f"layer %{{y}}, {shown}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": name}, "thickness": 10, "xpad": 4, "nticks": 5},
        **label,
    )


def _place_bars(figure: go.Figure) -> None:
    """Give every map its colour bar beside itself."""
    for i, heat in enumerate(figure.data):
        axis = figure.layout["yaxis" if i == 0 else f"yaxis{i + 1}"]
        low, high = axis.domain
        heat.update(colorbar={"y": (low + high) / 2, "len": high - low})


def _labelled(figure: go.Figure, layout: dict[str, Any], x: dict[str, Any]) -> go.Figure:
    """Layers from the top, by name: not as numbers with halves between them."""
    names = {"type": "category", "showgrid": False}
    y = {**names, "autorange": "reversed", "title": {"text": "layer"}}
    return laid_out(figure, layout, {**names, **x}, y)


def _pixels(found: BitMap) -> int:
    """Height of a map."""
    return min(_MOST_PIXELS, max(_LEAST_PIXELS, _ROW_PIXELS * len(found.layers)))

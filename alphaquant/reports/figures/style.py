"""What all figures share: fonts, colours, room, and how a logarithmic axis shows zero."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
INK = "#1f2933"
GRID = "#e4e7eb"

# Okabe and Ito, Color Universal Design, 2008: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, GREY = "#cc79a7", "#7b8794"

_BELOW = 3.0
_NO_POSITIVE = 1e-3
_DENSE_BELOW = 200.0
_NARROW_BELOW = 6.25
"""Ratio of highest to lowest from which on two of 1, 2, 5, 10, ... are between them for sure."""
_BELOW_AXIS_PIXELS = 62


@dataclass(frozen=True)
class LogScale:
    """Numbers on a logarithmic axis, which has no place for 0.

    Attributes:
        floor: where 0 is drawn: below the lowest positive number by a factor of 3.
        low: the lowest number that is drawn, the floor if there is a 0.
        top: the highest number.
    """

    floor: float
    low: float
    top: float

    def place(self, value: float) -> float | None:
        """Where a number is drawn; None where it is not finite, so nowhere."""
        return max(value, self.floor) if math.isfinite(value) else None

    def below(self, value: float, length: float) -> float:
        """How long an error bar may be downwards."""
        return max(0.0, min(length, value - self.floor))

    def axis(self, title: str) -> dict[str, object]:
        """A logarithmic axis with plain numbers, few enough for a phone.

        Worked example: from 0.0039 to 0.0046 at 0.0038, 0.004, 0.0042, ...; from 0.001 to 0.02 at
        0.001, 0.002, 0.005, 0.01, ...; from 0.001 to 1 at the powers of ten alone.
        """
        ticks = self._ticks()
        return {
            "type": "log",
            "title": {"text": title},
            "tickvals": ticks,
            "ticktext": [_plain(tick) for tick in ticks],
        }

    def _ticks(self) -> list[float]:
        if self.low < self.top < _NARROW_BELOW * self.low:
            step = _round_step((self.top - self.low) / 4)
            first, last = math.floor(self.low / step), math.ceil(self.top / step)
            return [i * step for i in range(max(1, first), last + 1)]
        lowest, highest = math.floor(math.log10(self.floor)), math.ceil(math.log10(self.top))
        steps = (1, 2, 5) if self.top / self.floor < _DENSE_BELOW else (1,)
        return [step * 10.0**power for power in range(lowest, highest + 1) for step in steps]


def log_scale(values: Sequence[float]) -> LogScale:
    """The scale of these numbers.

    Worked example: of (0, 0.3, 0.6) the floor is 0.1, where the 0 is drawn.
    """
    drawn = [v for v in values if math.isfinite(v)]
    positive = [v for v in drawn if v > 0]
    if not positive:
        return LogScale(_NO_POSITIVE, _NO_POSITIVE, 1.0)
    floor = min(positive) / _BELOW
    return LogScale(floor, max(min(drawn), floor), max(positive))


def styled(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure the house style: light, as wide as its place, legend below.

    Args:
        figure: changed and returned.
        height: pixels.
    """
    below = -_BELOW_AXIS_PIXELS / (height - 2 * _BELOW_AXIS_PIXELS)
    layout = {
        "template": "none",
        "height": height,
        "autosize": True,
        "margin": {"l": 62, "r": 14, "t": 34, "b": 50},
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": GREY, "align": "left"},
        "legend": {"orientation": "h", "yanchor": "top", "y": below, "x": 0, "xanchor": "left"},
        "dragmode": False,
    }
    axis = {
        "gridcolor": GRID,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 13}},
    }
    return laid_out(figure, layout, {**axis, "title": {"standoff": 6, "font": {"size": 13}}}, axis)


def laid_out(
    figure: go.Figure,
    layout: Mapping[str, Any] | None = None,
    x: Mapping[str, Any] | None = None,
    y: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Add to a figure's layout, in one pass.

    plotly's `update_layout` and `update_xaxes` look up every part by its path: a report's six
    figures took them 0.2 s, half of a report.

    Args:
        figure: changed and returned.
        layout: parts of the layout; what is nested is merged.
        x: parts of every axis across.
        y: parts of every axis upwards.
    """
    made = figure.layout.to_plotly_json()
    _merge(made, layout or {})
    for name in {"xaxis", "yaxis", *made}:
        if name.startswith(("xaxis", "yaxis")):
            _merge(made.setdefault(name, {}), (x if name.startswith("x") else y) or {})
    figure.layout = made
    return figure


def _merge(made: dict[str, Any], parts: Mapping[str, Any]) -> None:
    """Put parts into a layout."""
    for name, part in parts.items():
        if isinstance(part, Mapping) and isinstance(made.get(name), dict):
            _merge(made[name], part)
        else:
            made[name] = dict(part) if isinstance(part, Mapping) else part


def _round_step(at_least: float) -> float:
    """The lowest of 1, 2, 5 times a power of ten that is not below a number."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(s * power for s in (1, 2, 5, 10) if s * power >= at_least)


def _plain(tick: float) -> str:
    """A tick's number: `0.002`, below 0.0001 `2e-5`."""
    if tick > 9e-5:
        return f"{tick:.6f}".rstrip("0").rstrip(".")
    return f"{tick:.4g}".replace("e-0", "e-")

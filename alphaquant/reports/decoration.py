"""What optuna-dashboard shows of a search that has ended: its note with the front, its figures."""

from collections.abc import Mapping

import optuna
import plotly.graph_objects as go
from optuna_dashboard import save_plotly_graph_object

from alphaquant.reports.figures.plots import figures
from alphaquant.reports.figures.style import laid_out
from alphaquant.reports.front import front_rows
from alphaquant.reports.notes import save_study_note, study_note
from alphaquant.reports.sections import stop_text
from alphaquant.reports.tables import markdown
from alphaquant.reports.verdict import headline, sentence, winner_text
from alphaquant.studies.result import SearchResult

FIGURE_ID = "alphaquant-"
"""Start of the ids of our figures; a figure of the same id is replaced, not added."""

_TITLES: Mapping[str, str] = {
    "front": "Front: size and divergence,<br>held-out text",
    "trials": "All trials: size and divergence,<br>evaluation text",
    "layers": "Bits per weight<br>by layer and role, best.json",
    "experts": "Bits per weight and calibration<br>tokens by expert, best.json",
    "costs": "Predicted and measured divergence",
    "stages": "What each stage gained",
}

_CARD_HEIGHT = 450
"""Pixels that optuna-dashboard gives to a figure; what is below is cut off."""

_ABOVE, _BELOW, _AXIS = 76, 140, 60
"""Pixels above a card's plot, for a title of two lines; below it, for a legend of four; of the
latter those of the axis."""


def decorate(study: optuna.Study, result: SearchResult) -> None:
    """Write into a study what the search found; doing it again replaces what is there.

    Raises:
        optuna.exceptions.OptunaError: the storage is unreachable.
    """
    said = (headline(result).text, winner_text(result))
    sentences = [f"{sentence(text)}." for text in said]
    found = "\n\n".join([*sentences, _front_table(result), stop_text(result)])
    save_study_note(study, study_note(result.spec, result.space.menu, found))
    for name, figure in figures(result).items():
        card = _as_card(figure, _TITLES.get(name, name))
        save_plotly_graph_object(study, card, graph_object_id=FIGURE_ID + name)


def _front_table(result: SearchResult) -> str:
    """Published points, in fewer columns than report.md: a page of the dashboard is narrow."""
    head = ["", "bits per weight", "MB", "KL (held-out text)", "best uniform, no larger", "its KL"]
    rows = []
    for row in front_rows(result):
        mark = " (best)" if row.is_best else ""
        mark += "" if row.is_within_budget else " (above the budget)"
        rows.append(
            [
                f"`{row.config}`{mark}",
                f"{row.bits_per_weight:.4f}",
                row.megabytes,
                row.kl_text,
                row.rival_name,
                row.rival_kl,
            ]
        )
    return markdown(head, rows)


def _as_card(figure: go.Figure, title: str) -> go.Figure:
    """A copy of a figure as a card of the dashboard: titled, and all of it within the card."""
    card = go.Figure(figure)
    layout = {
        "title": {"text": title, "x": 0.02, "xref": "container", "y": 0.96, "font": {"size": 15}},
        "height": _CARD_HEIGHT,
        "margin": {"t": _ABOVE},
        "font": {"size": 10},
    }
    if len(card.data) > 1 and "scatter" in card.data[0].type:
        layout["margin"] = {"t": _ABOVE, "b": _BELOW}
        layout["legend"] = {"y": -_AXIS / (_CARD_HEIGHT - _ABOVE - _BELOW)}
    axis = {"title": {"font": {"size": 10}}}
    return laid_out(card, layout, axis, axis)

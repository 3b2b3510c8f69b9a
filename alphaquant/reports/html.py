"""report.html: what report.md says, with figures, as one file that asks no network for anything.

Tables and sentences come from the functions of report.md, so there is one source of numbers. All
of it is readable without JavaScript but the figures, which plotly.js draws; that library is in the
file once and is nearly all of its 5 MB. A content security policy forbids every request.
"""

import json
import math
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from alphaquant.reports import sections
from alphaquant.reports.bits import bit_lines
from alphaquant.reports.cautions import cautions
from alphaquant.reports.figures.plots import figures, interval_half
from alphaquant.reports.front import config_name
from alphaquant.reports.markup import to_html
from alphaquant.reports.recipes import RECIPES_HEAD, recipes_text, to_use
from alphaquant.reports.shell import evaluate_command, use_command
from alphaquant.reports.verdict import headline, sentence, why_text, winner_text
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.profiles import Profile
from alphaquant.studies.gate.judge import HeldoutRow
from alphaquant.studies.result import SearchResult

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
_LONG_FACTS = ("calibration_tokens_per_expert", "rare_matrices")

_CAPTIONS = {
    "front": "Lower is closer to the original, further left is smaller; on held-out text, which "
    "the search never saw. Bars are 95 % intervals over windows. A KL of 0 is drawn at the lower "
    "edge. Click a published point to copy the command that quantizes to it.",
    "trials": "All that was tried, on the evaluation text, which the search saw.",
    "layers": "Mean stored bits per weight of best.json, by layer and role.",
    "experts": "Mean stored bits per weight of every routed expert in best.json, and the tokens "
    "that calibrated it.",
    "costs": "How well the costs, which are cheap, foretell the divergence that is measured. On "
    "the dotted line the two are equal; a search needs their order only.",
    "stages": "The lowest KL within the budget after each stage, and its ratio to the one before.",
}


def report_html(result: SearchResult) -> str:
    """The whole report as one HTML file."""
    title = f"{sections.model_name(result.provenance.model)} at {result.spec.limits.budget}"
    shown = figures(result)
    body = [
        _header(result, title),
        _warnings(result),
        *(f"<section>{part}</section>" for part in _sections(result, shown)),
    ]
    data = {
        "figures": {name: json.loads(figure.to_json()) for name, figure in shown.items()},
        "commands": commands(result),
    }
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)} - AlphaQuant</title>",
            f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n<main>",
            *body,
            '</main>\n<div id="said" role="status" aria-live="polite" hidden></div>',
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _header(result: SearchResult, title: str) -> str:
    """What one reads who reads no more: the headline, and its numbers with their errors."""
    said = headline(result)
    facts = [said.perplexity.replace("->", "\N{RIGHTWARDS ARROW}"), said.size]
    items = "".join(f"<span>{escape(sentence(text))}</span>" for text in facts if text)
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="claim">{_unbroken(sentence(said.claim))}</p>'
        f'<p class="lead">{items}</p>'
        f"{_cards(result)}</header>"
    )


def commands(result: SearchResult) -> dict[str, str]:
    """The command that quantizes to each published point, by its configuration's file."""
    names = [config_name(row) for row in result.gate.points]
    path = result.folder.path
    return {name: use_command(result.spec, path / name) for name in names}


def _sections(result: SearchResult, shown: Mapping[str, Any]) -> list[str]:
    """The parts below the warnings; a figure that a model lacks is left out."""
    text = {
        name: _figure(name, caption) if name in shown else ""
        for name, caption in _CAPTIONS.items()
    }
    return [
        "<h2>The front: size and closeness</h2>" + text["front"],
        _use(result),
        to_html(f"## Published points (held-out text)\n\n{sections.published_table(result)}")
        + to_html(f"{sections.FRONT_NOTE}\n\n{sections.files_table(result)}")
        + _command_list(result),
        to_html(
            f"## Why this one\n\nThe result: {winner_text(result)}.\n\n"
            f"Why this one: {why_text(result)}."
        )
        + _sizes(result),
        to_html(f"## The best trial by domain\n\n{sections.domain_text(result)}"),
        *_scores(result),
        to_html(f"## Withheld points\n\n{sections.withheld_text(result)}"),
        "<h2>Where the bits went</h2>" + text["layers"] + text["experts"],
        "<h2>All trials</h2>" + text["trials"],
        "<h2>What each stage gained</h2>" + text["stages"] + to_html(sections.gains_table(result)),
        "<h2>Costs and truth</h2>"
        + text["costs"]
        + to_html(f"### Random assignments\n\n{sections.costs_text(result)}"),
        *_recipes(result),
        _details("Other uniform formats", sections.uniform_table(result)),
        _details("Calibration coverage", sections.coverage_text(result)),
        _details(
            "The search", f"{sections.search_text(result)}\n\n{sections.seconds_table(result)}"
        ),
        _provenance(result),
    ]


def _scores(result: SearchResult) -> list[str]:
    text = sections.scores_text(result)
    head = "## Other scores of published trials"
    return [to_html(f"{head}\n\n{text}")] if text else []


def _recipes(result: SearchResult) -> list[str]:
    found = result.recipes
    return [] if found is None else [to_html(f"{RECIPES_HEAD}\n\n{recipes_text(found)}")]


def _cards(result: SearchResult) -> str:
    """Four numbers at a glance; the first is the one that matters."""
    best = result.gate.published_row
    cards = {"KL to the original": (f"{best.kl:.6f}", _kl_interval(best))}
    if best.rival is not None:
        name, size = best.rival.name, f"{best.rival.bits_per_weight:.3f} bits per weight"
        cards[f"KL of uniform {name}"] = (f"{best.rival.kl:.6f}", size)
    cards["same first token"] = (f"{100 * best.same_top:.2f} %", "of positions")
    bits = f"{result.counts.bits_per_weight:.3f}"
    cards["bits per weight"] = (bits, f"budget {result.limit:.3f}")
    inside = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>"
        for name, (value, note) in cards.items()
    )
    return f'<dl class="cards">{inside}</dl>'


def _kl_interval(row: HeldoutRow) -> str:
    half = interval_half(row)
    if not math.isfinite(half):
        return "of one window"
    return f"95 % interval {max(0.0, row.kl - half):.6f} to {row.kl + half:.6f}"


def _sizes(result: SearchResult) -> str:
    """The three counts in full."""
    lines = "\n".join(f"    {line}" for line in bit_lines(result.counts))
    return _details("Size of best.json", f"{lines}\n\n{counting_rule()}")


def _warnings(result: SearchResult) -> str:
    """One box with everything to beware of; nothing where there is nothing."""
    found = cautions(result)
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    count = f"{len(found)} caution{'s' if len(found) > 1 else ''}"
    return (
        f'<details class="warnings"><summary>Before you trust this: {count}</summary>'
        f"<ul>{items}</ul></details>"
    )


def _figure(name: str, caption: str) -> str:
    return (
        f'<figure><div id="figure-{name}" class="plot">This figure needs JavaScript.</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _command_list(result: SearchResult) -> str:
    """The command of every point, for who does not click points."""
    items = "".join(map(_command, commands(result).values()))
    return f"<details><summary>Commands</summary>{items}</details>"


def _command(text: str) -> str:
    """A command with a button that copies it."""
    return (
        f'<div class="command"><code>{_unbroken(text)}</code>'
        f'<button type="button" class="copy" data-command="{escape(text)}">copy</button></div>'
    )


def _unbroken(text: str) -> str:
    """Text whose words are not broken at hyphens: names of formats, options, files."""
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in text.split(" "))


def _use(result: SearchResult) -> str:
    """How to quantize to the winner, check it and load it."""
    profile = result.space.profile
    best = to_use(result)
    said = f"The profile is {profile.name} ({profile.description})."
    steps = [use_command(result.spec, best)]
    if profile.export:
        parts = [f"{said} {_engine_text(profile)}"]
    else:
        steps.append(evaluate_command(result.spec.checkpoint.model))
        code = ["import alphaquant", 'model = alphaquant.load("DIR")  # a transformers model']
        parts = [
            "The directory DIR loads with",
            "\n".join(f"    {line}" for line in code),
            "or, after import alphaquant, with AutoModelForCausalLM.from_pretrained of "
            "transformers.",
            said,
        ]
    shown, text = "".join(map(_command, steps)), "\n\n".join(parts)
    return f"<h2>What to run</h2>{shown}{to_html(text)}"


def _engine_text(profile: Profile) -> str:
    """What the files of an engine's profile are, and how far that was checked."""
    return (
        f"The directory DIR then holds files that {profile.engine} loads ({profile.checked}). "
        "Without --export, aq-quantize writes the same numbers as our own packed checkpoint, "
        "which aq-eval measures."
    )


def _details(title: str, text: str) -> str:
    """A part that is folded up until asked for."""
    return f"<details><summary>{escape(title)}</summary>{to_html(text)}</details>"


def _provenance(result: SearchResult) -> str:
    """What was asked of what, as the JSON that front.json has."""
    facts = {k: v for k, v in result.provenance.as_json().items() if k not in _LONG_FACTS}
    text = json.dumps({"settings": result.spec.facts(), "provenance": facts}, indent=1)
    return f"<details><summary>Provenance</summary><pre>{escape(text)}</pre></details>"


def _json(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    return json.dumps(content).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("alphaquant.reports") / "assets" / name).read_text(encoding="utf-8")

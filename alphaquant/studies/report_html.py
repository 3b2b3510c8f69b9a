"""report.html: what report.md says, with figures, as one file that asks no network for anything.

Tables and sentences come from the functions of report.md, so there is one source of numbers. All
of it is readable without JavaScript but the figures, which plotly.js draws; that library is in the
file once and is nearly all of its 5 MB. A content security policy forbids every request.
"""

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.profiles import Profile
from alphaquant.studies.cautions import cautions
from alphaquant.studies.commands import evaluate_command, quantize_command
from alphaquant.studies.markup import to_html
from alphaquant.studies.plots import figures
from alphaquant.studies.report_sections import (
    config_name,
    costs_text,
    coverage_text,
    domain_text,
    gains_table,
    model_name,
    published_table,
    scores_text,
    search_text,
    uniform_table,
    why_text,
    winner_text,
    withheld_text,
)
from alphaquant.studies.result import SearchResult
from alphaquant.studies.sizes import bit_lines
from alphaquant.studies.tables import markdown

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
_LONG_FACTS = ("calibration_tokens_per_expert", "rare_matrices")

_CAPTIONS = {
    "front": "Bars are 95 % intervals over windows. A KL of 0 is drawn at the lower edge. Click a "
    "published point to copy the command that quantizes to it; all commands are in the list "
    "below.",
    "layers": "Mean stored bits per weight of best.json, by layer and role.",
    "experts": "Mean stored bits per weight of every routed expert in best.json, and the tokens "
    "that calibrated it.",
    "costs": "How well the costs, which are cheap, foretell the divergence that is measured. On "
    "the dotted line the two are equal; a search needs their order only.",
    "stages": "The lowest KL within the budget after each stage, and its ratio to the one before.",
}


def report_html(result: SearchResult) -> str:
    """The whole report as one HTML file."""
    title = f"{model_name(result.facts['model'])} at {result.spec.budget}"
    shown = figures(result)
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(winner_text(result))}.</p>',
        f"<p>Why this one: {escape(why_text(result))}.</p>",
        _cards(result),
        "</header>",
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


def commands(result: SearchResult) -> dict[str, str]:
    """The command that quantizes to each published point, by its configuration's file."""
    names = [config_name(row) for row in result.gate.points]
    path = result.folder.path
    return {name: quantize_command(result.spec.model, path / name) for name in names}


def _sections(result: SearchResult, shown: Mapping[str, Any]) -> list[str]:
    """The parts below the warnings; a figure that a model lacks is left out."""
    text = {
        name: _figure(name, caption) if name in shown else ""
        for name, caption in _CAPTIONS.items()
    }
    return [
        "<h2>The front</h2>" + text["front"] + _command_list(result),
        to_html(f"## Published points (held-out text)\n\n{published_table(result)}"),
        to_html(f"## The best trial by domain\n\n{domain_text(result)}"),
        *_scores(result),
        to_html(f"## Withheld points\n\n{withheld_text(result)}"),
        "<h2>Where the bits went</h2>" + text["layers"] + text["experts"],
        _use(result),
        "<h2>Costs and truth</h2>"
        + text["costs"]
        + to_html(f"### Random assignments\n\n{costs_text(result)}"),
        "<h2>What each stage gained</h2>" + text["stages"] + to_html(gains_table(result)),
        _details("Other uniform formats", uniform_table(result)),
        _details("Calibration coverage", coverage_text(result)),
        _details("The search", f"{search_text(result)}\n\n{_seconds(result)}"),
        _provenance(result),
    ]


def _scores(result: SearchResult) -> list[str]:
    text = scores_text(result)
    head = "## Other scores of published trials"
    return [to_html(f"{head}\n\n{text}")] if text else []


def _cards(result: SearchResult) -> str:
    """Sizes at a glance, then the three counts in full."""
    counts, best = result.counts, result.gate.row(_published_name(result))
    cards = {
        "bits per weight": (f"{counts.bits_per_weight:.3f}", f"budget {result.limit:.3f}"),
        "checkpoint": (f"{counts.checkpoint_bytes / 1e6:,.2f} MB", "all tensors"),
        "KL, held-out text": (f"{best.kl:.6f}", f"+- {best.kl_stderr:.6f}"),
        "same first token": (f"{100 * best.same_top:.2f} %", "of positions"),
    }
    inside = "".join(
        f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>"
        for name, (value, note) in cards.items()
    )
    lines = "\n".join(f"    {line}" for line in bit_lines(result.counts))
    sizes = _details("Size of best.json", f"{lines}\n\n{counting_rule()}")
    return f'<dl class="cards">{inside}</dl>{sizes}'


def _published_name(result: SearchResult) -> str:
    return next(r.name for r in result.gate.points if r.digest == result.published.digest)


def _warnings(result: SearchResult) -> str:
    """One box with everything to beware of; nothing where there is nothing."""
    found = "".join(f"<li>{escape(text)}</li>" for text in cautions(result))
    if not found:
        return ""
    return f'<aside class="warnings"><h2>Before you trust this</h2><ul>{found}</ul></aside>'


def _figure(name: str, caption: str) -> str:
    return (
        f'<figure><div id="figure-{name}" class="plot">This figure needs JavaScript.</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _command_list(result: SearchResult) -> str:
    """Every command with a button that copies it, for who does not click points."""
    items = "".join(
        f"<li><code>{escape(command)}</code> "
        f'<button type="button" class="copy" data-config="{escape(name)}">copy</button></li>'
        for name, command in commands(result).items()
    )
    return f"<details><summary>Commands</summary><ul>{items}</ul></details>"


def _use(result: SearchResult) -> str:
    """How to quantize to the winner, check it and load it."""
    profile = result.space.profile
    model = result.spec.model
    steps = [quantize_command(model, result.folder.path / "best.json"), evaluate_command(model)]
    code = ["import alphaquant", "", 'model = alphaquant.load("DIR")  # a transformers model']
    parts = [
        "## Use best.json",
        "\n".join(f"    {step}" for step in steps),
        f"The profile is {profile.name} ({profile.description}).{_engine_text(profile)}",
        "The directory DIR loads with",
        "\n".join(f"    {line}" for line in code).replace("\n    \n", "\n"),
        "or, after import alphaquant, with AutoModelForCausalLM.from_pretrained of transformers.",
    ]
    return to_html("\n\n".join(parts))


def _engine_text(profile: Profile) -> str:
    """What a profile does not do yet."""
    if profile.is_own_runtime:
        return ""
    return (
        " Every format in best.json is one that this engine can load, but aq-quantize writes our "
        "own checkpoint format and not the engine's."
    )


def _details(title: str, text: str) -> str:
    """A part that is folded up until asked for."""
    return f"<details><summary>{escape(title)}</summary>{to_html(text)}</details>"


def _seconds(result: SearchResult) -> str:
    rows = [[name, f"{seconds:.1f}"] for name, seconds in result.seconds.items()]
    return markdown(["stage", "seconds"], rows)


def _provenance(result: SearchResult) -> str:
    """What was asked of what, as the JSON that front.json has."""
    facts = {k: v for k, v in result.facts.items() if k not in _LONG_FACTS}
    text = json.dumps({"settings": result.spec.facts(), "provenance": facts}, indent=1)
    return f"<details><summary>Provenance</summary><pre>{escape(text)}</pre></details>"


def _json(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    return json.dumps(content).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("alphaquant.studies") / "assets" / name).read_text(encoding="utf-8")

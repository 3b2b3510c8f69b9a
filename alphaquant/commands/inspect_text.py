"""How an inspection looks: tables of 80 columns for people, JSON for programs."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alphaquant.commands.inspect import Inspection, Loadable, Part
from alphaquant.reports.bits import bit_lines
from alphaquant.reports.tables import aligned, fitted, with_error, wrapped
from alphaquant.runtime.integrity import CHECKSUMS, Verified
from alphaquant.spaces.foreign import Foreign
from alphaquant.spaces.formats import parse_format

MAX_WARNINGS = 8
"""Warnings that the text lists; more are counted, and JSON has all."""

_WIDTH = 80
_NAMES = 17
"""Columns of the names before sizes."""


def inspection_text(found: Inspection, width: int | None = None) -> str:
    """Everything for people, in paragraphs.

    Args:
        found: what was inspected.
        width: characters of the screen; columns that do not fit are left out. None for all.
    """
    whose = f"{found.statement.path}{_owner_text(found)} on {found.model.name}"
    parts = [
        _indented(whose, width),
        summary_text(found.statement.summary),
        "\n".join(
            wrapped(line, width, _NAMES)
            for line in [*bit_lines(found.counts), *_size_lines(found)]
        ),
        _parts_table("role", found.roles, width),
        _formats_table(found.roles, width),
        _parts_table("layer", found.layers, width),
        _unnamed_text(found),
        "\n".join(_engine_text(engine, width) for engine in found.engines),
        warnings_text(found.warnings, width),
    ]
    return "\n\n".join(part for part in parts if part)


def _owner_text(found: Inspection) -> str:
    """Whose configuration it is where it is not ours."""
    content = found.statement.content
    return f", a configuration of {content.tool}," if isinstance(content, Foreign) else ""


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Everything for programs."""
    kept = found.model.inventory.kept
    return {
        "path": str(found.statement.path),
        "model": found.model.name,
        "model_type": found.model.inventory.model_type,
        "assignment_digest": found.plan.assignment.digest,
        "bits": asdict(found.counts),
        "kept": {"n_tensors": len(kept), "n_bytes": sum(k.n_bytes for k in kept)},
        "active": None if found.active is None else asdict(found.active),
        "roles": [part_json(part) for part in found.roles],
        "layers": [part_json(part) for part in found.layers],
        "unnamed": [
            {"role": role, "format": label, "n_matrices": n}
            for (role, label), n in found.unnamed.items()
        ],
        "unmatched_patterns": list(found.plan.unmatched_patterns),
        "engines": [
            {"engine": e.engine, "is_loadable": not e.reasons, "reasons": list(e.reasons)}
            for e in found.engines
        ],
        "summary": dict(found.statement.summary),
        "warnings": list(found.warnings),
    }


def verified_text(checked: Verified) -> str:
    """What was checked of a packed checkpoint, in one line."""
    files = f"{checked.n_files} files of {checked.n_bytes} bytes are what was written (sha256)"
    if not checked.n_files:
        files = f"no {CHECKSUMS} of its files, so only numbers were checked"
    return (
        f"{checked.path}: {files}; {checked.n_scales} tensors of scales and {checked.n_kept} "
        f"other tensors hold usable numbers; {checked.seconds:.1f} s"
    )


def verified_json(checked: Verified) -> dict[str, Any]:
    """The same for programs."""
    return asdict(checked)


def part_json(part: Part) -> dict[str, Any]:
    """A part with what follows from it."""
    return {
        **asdict(part),
        "bits_per_weight": part.bits_per_weight,
        "n_bytes": part.n_bytes,
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """What a search or a quantization wrote into its result; "" where nothing is known of it."""
    lines = []
    for name in ("model", "model_digest", "budget", "profile", "origin", "trial"):
        if summary.get(name) is not None:
            lines.append(f"{name.replace('_', ' '):<12} {summary[name]}")
    evaluation = summary.get("evaluation")
    if scores_of(summary) and isinstance(evaluation, Mapping) and "source" in evaluation:
        lines.append(f"{'evaluated on':<12} {source_text(evaluation)}")
    for score in scores_of(summary).values():
        value, stderr = score["value"], score.get("stderr")
        shown = f"{value:.6f}" if stderr is None else with_error(value, stderr)
        lines.append(f"{score['metric']:<12} {shown} {score.get('unit', '')}")
    return "\n".join(lines)


def scores_of(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Scores on the evaluation text by metric; what is not of their form is left out."""
    scores = summary.get("scores")
    return {
        str(score["metric"]): score
        for score in (scores if isinstance(scores, list) else [])
        if isinstance(score, Mapping)
        and isinstance(score.get("value"), int | float)
        and isinstance(score.get("stderr"), int | float | None)
        and "metric" in score
    }


def source_text(provenance: Mapping[str, Any]) -> str:
    """`demo, 48 x 256 tokens` of the provenance of a text."""
    name, n, length = (provenance.get(key) for key in ("source", "n_samples", "seq_len"))
    return f"{name}, {n} x {length} tokens"


def _size_lines(found: Inspection) -> list[str]:
    """What a token reads, and what stays as it is."""
    active, kept = found.active, found.model.inventory.kept
    if active is None:
        reads = "unknown: the model does not state its experts per token"
    else:
        k = active.experts_per_token
        uniform = f" ({k} experts, all used alike)" if k else ""
        reads = f"{active.n_bytes} bytes of {active.n_weights} weights{uniform}"
    n_bytes = sum(k.n_bytes for k in kept)
    return [
        f"read per token   {reads}",
        f"not quantizable  {n_bytes} bytes in {len(kept)} tensors",
    ]


def _parts_table(title: str, parts: Sequence[Part], width: int | None) -> str:
    head = (title, "matrices", "weights", "bits", "bytes", "formats")
    rows = [
        [
            *(part.name, str(part.n_matrices), str(part.n_weights)),
            *(f"{part.bits_per_weight:.4f}", str(part.n_bytes), str(len(part.weights_by_format))),
        ]
        for part in parts
    ]
    return fitted(head, rows, width, ("formats", "weights", "matrices"), left=("role",))


def _formats_table(roles: Sequence[Part], width: int | None) -> str:
    """Shares of each role's weights in every format, the smallest format first."""
    labels = sorted({label for role in roles for label in role.weights_by_format}, key=label_order)
    rows = [[role.name, *(_share_text(role, label) for label in labels)] for role in roles]
    return fitted(("role", *labels), rows, width, left=("role",))


def _share_text(part: Part, label: str) -> str:
    """The share of a part's weights in a format; nothing where it has none."""
    n_weights = part.weights_by_format.get(label)
    return "" if n_weights is None else f"{100 * n_weights / part.n_weights:.1f} %"


def label_order(label: str) -> tuple[float, str]:
    """Sorts labels by nominal bits of the weights."""
    return parse_format(label.split(" ", 1)[0]).nominal_bits, label


def _unnamed_text(found: Inspection) -> str:
    if not found.unnamed:
        return ""
    rows = [[role, label, str(n)] for (role, label), n in sorted(found.unnamed.items())]
    table = aligned(("role", "format", "matrices"), rows, left=("role", "format"))
    return f"no pattern names these, so they take the default\n{table}"


def _engine_text(engine: Loadable, width: int | None) -> str:
    """Whether an engine loads it; more than one reason makes more than one paragraph."""
    if not engine.reasons:
        return f"{engine.engine:<13}loads these formats and shapes"
    lines = [f"{engine.engine:<13}does not: {engine.reasons[0]}"]
    lines += [f"{'':<13}and: {reason}" for reason in engine.reasons[1:]]
    return "\n".join(_indented(line, width, 13) for line in lines)


def warnings_text(warnings: Sequence[str], width: int | None = None) -> str:
    """The first warnings, and how many more there are.

    Args:
        warnings: all.
        width: characters of the screen; None for 80.
    """
    lines = [_indented(f"warning: {text}", width, 9) for text in warnings[:MAX_WARNINGS]]
    if len(warnings) > MAX_WARNINGS:
        lines.append(f"and {len(warnings) - MAX_WARNINGS} more warnings; --json has all")
    return "\n".join(lines)


def _indented(text: str, width: int | None, indent: int = 0) -> str:
    """Lines of at most 80 columns; names longer than that are not broken."""
    return textwrap.fill(
        text,
        min(width or _WIDTH, _WIDTH),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )

"""What a search measured of a checkpoint, kept beside it and told where it is measured again.

`aq-quantize` writes it into the report of a checkpoint (`searched`) where the checkpoint is the
search's own: its formats, settings, weights and calibration windows. Exports keep the report.
`aq-eval` reads it there; numbers compare only where the windows are the same.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaquant.models.quantization_config import REPORT
from alphaquant.spaces.json_files import JsonError, read_object
from alphaquant.texts.windows import TokenSet

_SCORES = ("kl", "kl_stderr", "same_top", "perplexity")


@dataclass(frozen=True)
class Made:
    """What a checkpoint is made of.

    Attributes:
        assignment_digest: of its formats.
        model_digest: of the original's weights.
        calibration_digest: of the calibration windows.
        is_changed: whether flags changed settings of the search, or inputs are rounded.
    """

    assignment_digest: str
    model_digest: str
    calibration_digest: str | None
    is_changed: bool


def searched_scores(summary: Mapping[str, Any], made: Made) -> dict[str, Any] | None:
    """The held-out scores of a configuration's search; None where this is another checkpoint.

    Args:
        summary: of the configuration.
        made: what the checkpoint is made of.

    Returns:
        `kl`, `kl_stderr`, `same_top`, `perplexity`, and `text`, provenance of the windows.
    """
    text = summary.get("heldout_text")
    calibration = summary.get("calibration")
    stated = calibration.get("digest") if isinstance(calibration, Mapping) else None
    is_same = (summary.get("model_digest"), stated) == (made.model_digest, made.calibration_digest)
    if made.is_changed or not is_same or not isinstance(text, Mapping):
        return None
    row = _row(summary.get("heldout"), made.assignment_digest)
    return None if row is None else {**{name: row[name] for name in _SCORES}, "text": dict(text)}


def _row(rows: Any, digest: str) -> Mapping[str, Any] | None:
    """The row of an assignment that has all scores."""
    for row in rows if isinstance(rows, Sequence) else ():
        if isinstance(row, Mapping) and row.get("digest") == digest and _has_scores(row):
            return row
    return None


def _has_scores(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), float) for name in _SCORES)


def read_searched(model: str) -> dict[str, Any] | None:
    """What the report of a checkpoint, or beside a GGUF file, says of its search, if it does.

    Args:
        model: a directory or file; any other name has none.
    """
    path = Path(model)
    try:
        report = read_object((path.parent if path.is_file() else path) / REPORT)
    except (OSError, JsonError):  # other people's models have none, or another file of that name
        return None
    found = report.get("searched")
    if not isinstance(found, dict) or not isinstance(found.get("text"), dict):
        return None
    return found if _has_scores(found) else None


def searched_text(found: Mapping[str, Any], tokens: TokenSet | None) -> str:
    """The search's KL for people, and whether it is of the same windows.

    Args:
        found: from `read_searched`.
        tokens: the windows that were measured now.
    """
    text = found["text"]
    kl = f"the search's kl {found['kl']:.6f} +- {found['kl_stderr']:.6f}"
    if is_same_text(found, tokens):
        return f"{kl}, on the same windows"
    options = {
        "data": text.get("source"),
        "samples": text.get("n_samples"),
        "seq-len": text.get("seq_len"),
        "seed": text.get("seed"),
        "bos": "always" if text.get("bos") else "never",
    }
    given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"{kl}, on other windows: for the same ones give {given}"


def is_same_text(found: Mapping[str, Any], tokens: TokenSet | None) -> bool:
    """Whether the search measured the same windows."""
    return tokens is not None and found["text"].get("digest") == tokens.digest

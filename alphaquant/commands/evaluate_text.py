"""What was measured of a model, for people and for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alphaquant.commands.evaluate import Evaluation
from alphaquant.commands.searched import is_same_text, searched_text
from alphaquant.evaluators.registry import EVALUATORS
from alphaquant.provenance import versions
from alphaquant.reports.tables import fitted, wrapped
from alphaquant.runtime.mixed.loader import MixedStatistics


def evaluation_text(found: Evaluation, width: int | None = None) -> str:
    """The scores for people, one per line, and what they were measured on.

    Args:
        found: what was measured.
        width: characters of the screen; columns that do not fit are left out. None for all.
    """
    compared = {name for entry in EVALUATORS.values() if entry.compares for name in entry.names}
    reference = {s.metric: s for s in found.reference_scores if s.metric not in compared}
    rows = []
    for score in found.scores:
        stderr = "" if score.stderr is None else f"+- {score.stderr:.6f}"
        beside = reference.get(score.metric)
        original = "" if beside is None else f"original {beside.value:.6f}"
        rows.append([score.metric, f"{score.value:.6f}", stderr, score.unit, original])
    head = ("metric", "value", "stderr", "unit", "")
    lines = [fitted(head, rows, width, ("unit",), left=("metric", "unit", ""))]
    if found.tokens is not None:
        n_samples, seq_len = found.tokens.tokens.shape
        lines.append(
            f"{n_samples} of {found.tokens.n_available} windows of {seq_len} tokens of "
            f"{found.tokens.name}, digest {found.tokens.digest[:12]}"
        )
    if found.searched is not None and any(score.metric == "kl" for score in found.scores):
        lines.append(searched_text(found.searched, found.tokens))
    if found.engine:
        lines.append(", ".join(f"{name} {value}" for name, value in found.engine.items()))
    lines += [_mixed_text(role, part) for role, part in found.mixed.items()]
    lines += [_harness_text(d) for d in found.details.values() if "lm_eval" in d]
    return "\n".join(wrapped(line, width) for line in lines)


def _mixed_text(role: str, found: MixedStatistics) -> str:
    """What of a mixed_precision file is in a model."""
    forms = ", ".join(f"{count} {name}" for name, count in sorted(found["forms"].items()))
    return (
        f"{role}: loaded {found['loaded']} of {found['total']} weights, matrices {forms}; "
        f"{found['memory_saved_mb']:.2f} MiB less than in bfloat16"
    )


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The scores with their provenance, for programs."""
    spec = found.spec
    return {
        "model": spec.model,
        "reference": spec.reference,
        "tasks": list(spec.names),
        "scores": [asdict(s) for s in found.scores],
        "reference_scores": [asdict(s) for s in found.reference_scores],
        "details": found.details,
        "reference_details": found.reference_details,
        **({"mixed_precision": found.mixed} if found.mixed else {}),
        "data": None if found.tokens is None else found.tokens.provenance(),
        "task_data": None if spec.task_data is None else str(spec.task_data),
        "dtype": spec.dtype,
        "batch_size": spec.batch_size,
        **({"gguf": found.gguf} if found.gguf else {}),
        **({"engine": found.engine} if found.engine else {}),
        **_searched_json(found),
        "versions": versions(),
    }


def _searched_json(found: Evaluation) -> dict[str, Any]:
    if found.searched is None:
        return {}
    is_same = is_same_text(found.searched, found.tokens)
    return {"searched": {**found.searched, "is_same_text": is_same}}


def _harness_text(details: Mapping[str, Any]) -> str:
    """What tasks of lm-eval were measured on."""
    rows: Sequence[Mapping[str, Any]] = details["tasks"]
    shots = ", ".join(str(n) for n in sorted({row["n_shots"] for row in rows}))
    n_samples, n_available, n_cut = (
        sum(row[key] for row in rows) for key in ("n_samples", "n_available", "n_cut")
    )
    cut = f", {n_cut} prompts cut to the last {details['max_length']} tokens" if n_cut else ""
    return (
        f"lm-eval {details['lm_eval']}: {n_samples} of {n_available} documents of {len(rows)} "
        f"tasks, {shots} shots{cut}"
    )

"""Markdown notes of a study and of its trials, for whoever looks at them in optuna-dashboard.

The note of a trial is saved before the trial is finished, that of the study when the search begins
and again when it has ended. What a user writes below the last line of ours stays.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import optuna
from optuna_dashboard import get_note, save_note

from alphaquant.reports.figures.bitmaps import bits_by_role
from alphaquant.reports.shell import use_command
from alphaquant.reports.tables import markdown, with_error
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.config import config_from_assignment, dump_config
from alphaquant.spaces.units import Inventory
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.store.folder import CONFIG_FILE, RunFolder
from alphaquant.studies.store.study import TrialRow

YOUR_NOTES = "*What you write below this line stays when the search is run again.*"

_ORIGINS: Mapping[str, str] = {
    "uniform:FORMAT": "one format for every matrix, to compare with",
    "allocator:NAME": "the assignment that one allocation rule chooses within the budget",
    "size": "the solver's optimum at another size than the budget, for the front",
    "knobs": "the solver's optimum of costs that Optuna's parameters bend",
    "groups": "formats that Optuna chose for groups of units",
}


def study_note(
    spec: SearchSpec, menu: tuple[str, ...], found: str = "The search is running."
) -> str:
    """What a study is: found, asked, counted, measured, and how to use one of its trials.

    Args:
        spec: what was asked.
        menu: formats to choose from.
        found: what has come of it, Markdown.
    """
    data = spec.texts
    asked = [
        ["model", f"`{spec.checkpoint.model}`"],
        ["budget", f"`{spec.limits.budget}`" + _limits_text(spec)],
        ["menu", ", ".join(f"`{name}`" for name in menu)],
        ["profile", f"`{spec.limits.profile}`"],
        ["calibration text", f"`{data.calibration}`, {data.calibration_samples} windows"],
        ["evaluation text", f"`{data.evaluation}`, {data.evaluation_samples} windows"],
        ["held-out text", f"`{data.heldout}`, {data.heldout_samples} windows"],
        ["results", f"`{spec.run.out}`"],
    ]
    origins = [[f"`{name}`", text] for name, text in _ORIGINS.items()]
    return "\n\n".join(
        [
            f"# Number formats for {spec.checkpoint.model} at {spec.limits.budget}",
            "Every trial is an assignment: one number format for every matrix of the model.",
            "## Found",
            found,
            "## Use a trial",
            f"Open the trial, download `{CONFIG_FILE}` under Artifacts, and run\n\n"
            f"    {_quantize_text(spec)}",
            "## Asked",
            markdown(["", ""], asked),
            "## Values",
            "`bits_per_weight` is the size, `kl` the divergence from the original model on the "
            "evaluation text in nats per token; both are minimized"
            f"{_objectives_text(spec)}. Trials that Optuna calls "
            "pruned were measured on their first windows only, because a trial that is no larger "
            f"was better there beyond doubt. {counting_rule()}",
            "## Origins",
            markdown(["origin", "what the trial is"], origins),
        ]
    )


def _objectives_text(spec: SearchSpec) -> str:
    others = [name.strip() for name in spec.scores.objectives.split(",")][2:]
    named = ", ".join(f"`{name}`" for name in others)
    return f"; so is what {named} stands for, each in its direction" if others else ""


def begin_study_note(study: optuna.Study, text: str) -> None:
    """Save the note of a study that has none yet; one that was saved before may say more.

    Raises:
        optuna.exceptions.OptunaError: the storage is unreachable.
    """
    if not get_note(study):
        save_study_note(study, text)


def save_study_note(study: optuna.Study, text: str) -> None:
    """Save the note of a study; a user's own notes below ours stay.

    Raises:
        optuna.exceptions.OptunaError: the storage is unreachable.
    """
    before, line, own = get_note(study).partition(YOUR_NOTES)
    if not line:
        own = f"\n\n{before}" if before else "\n"
    full = f"{text}\n\n---\n\n{YOUR_NOTES}{own}"
    if full != before + line + own:
        save_note(study, full)


def save_trial_note(trial: optuna.Trial, text: str) -> None:
    """Save the note of a trial.

    Raises:
        optuna.exceptions.OptunaError: the storage is unreachable.
    """
    save_note(trial, text)


@dataclass(frozen=True)
class TrialNotes:
    """Writes what the dashboard shows of a trial besides its numbers; see `TrialLoop.show`.

    Attributes:
        spec: the search.
        inventory: of the model.
        folder: keeps configurations, for download.
    """

    spec: SearchSpec
    inventory: Inventory
    folder: RunFolder

    def __call__(self, trial: optuna.Trial, assignment: Assignment, row: TrialRow) -> None:
        """Attach the trial's configuration and its note."""
        self.folder.attach(trial, self._config_text(assignment, row))
        save_trial_note(trial, trial_note(row, assignment, self.inventory, self.spec))

    def _config_text(self, assignment: Assignment, row: TrialRow) -> str:
        scores = {"kl": row.kl, "kl_stderr": row.kl_stderr, "predicted_kl": row.predicted_kl}
        summary = {
            **asdict(assignment.count_bits(self.inventory)),
            "study": self.spec.run.study,
            "origin": row.origin,
            "assignment_digest": row.digest,
            "evaluation": scores,
        }
        rotate = self.spec.checkpoint.rotate
        config = config_from_assignment(assignment, self.inventory, summary, rotate=rotate)
        return dump_config(config)


def trial_note(
    row: TrialRow, assignment: Assignment, inventory: Inventory, spec: SearchSpec
) -> str:
    """A trial's scores, what became of it, its bits by layer and role, and how to use it."""
    gap = "none: it was not solved for" if row.gap is None else f"{row.gap:.2e}"
    n_windows = len(row.kl_per_window)
    scores = [
        ["KL", f"{with_error(row.kl, row.kl_stderr)} nats per token, {n_windows} windows"],
        ["predicted KL", f"{row.predicted_kl:.6f} nats per token"],
        ["same top token", f"{100 * row.same_top:.2f} %"],
        ["perplexity", f"{row.perplexity:.3f}"],
        ["bits per weight", f"{row.bits_per_weight:.4f}"],
        ["checkpoint", f"{row.checkpoint_bytes} bytes ({row.checkpoint_bytes / 1e6:.2f} MB)"],
        *([name, f"{value:.6g}"] for name, value in row.extra.items()),
        ["solver's gap", gap],
        ["digest", f"`{row.digest}`"],
    ]
    parts = [
        f"# Trial {row.number} of the search: {row.origin}",
        *_fate(row),
        markdown(["score", "value"], scores),
        "## Bits per weight",
        bits_table(assignment, inventory),
        "## Use it",
        f"Download `{CONFIG_FILE}` under Artifacts, and run\n\n    {_quantize_text(spec)}",
    ]
    return "\n\n".join(parts)


def bits_table(assignment: Assignment, inventory: Inventory) -> str:
    """Mean stored bits per weight of each layer's matrices by role, as a Markdown table."""
    found = bits_by_role(assignment, inventory)
    rows = [
        [layer, *("" if math.isnan(value) else f"{value:.2f}" for value in values)]
        for layer, values in zip(found.layers, found.values.tolist(), strict=True)
    ]
    return markdown(["layer", *found.columns], rows)


def _fate(row: TrialRow) -> list[str]:
    """What became of a trial besides being measured, in words."""
    said = []
    if row.duplicate_of is not None:
        said.append(
            f"The same assignment as trial {row.duplicate_of}, whose numbers were taken over."
        )
    if row.is_pruned:
        said.append(
            f"Ended early: the numbers are those of the first {len(row.kl_per_window)} windows, "
            "where a trial that is no larger was better beyond doubt."
        )
    return said


def _limits_text(spec: SearchSpec) -> str:
    limits = {
        "formats per layer": spec.limits.max_formats_per_layer,
        "bits of every layer at least": spec.limits.layer_minimum_bits,
        "active bytes": spec.limits.active_budget,
    }
    return "".join(f", {name} {value}" for name, value in limits.items() if value is not None)


def _quantize_text(spec: SearchSpec) -> str:
    return use_command(spec, CONFIG_FILE)

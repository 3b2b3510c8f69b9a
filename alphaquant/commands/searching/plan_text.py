"""The plan of a search, for people."""

from alphaquant.models.pages.memory import GIB
from alphaquant.reports.tables import aligned
from alphaquant.studies.planning.estimate import Plan
from alphaquant.studies.sizing import size_lines


def plan_text(plan: Plan) -> str:
    """Sizes, a row per stage, and the sums."""
    rows = [
        [s.stage.text, _minutes(s.seconds), f"{s.memory / GIB:.1f}", f"{s.disk / GIB:.1f}"]
        for s in plan.stages
    ]
    total = [_minutes(plan.seconds), f"{plan.memory / GIB:.1f}", f"{plan.disk / GIB:.1f}"]
    head = ["stage", "minutes", "memory, GiB", "disk, GiB"]
    table = aligned(head, [*rows, ["all", *total]], left=["stage"])
    return "\n".join(
        [
            *size_lines(plan.spec),
            f"{plan.n_weights / 1e6:.0f} million quantizable weights, each in about "
            f"{plan.n_formats:.1f} formats",
            "",
            table,
            "",
            "estimates; the same command without --plan starts the search",
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"

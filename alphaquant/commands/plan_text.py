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
            *_slower(plan),
            "",
            "estimates; the same command without --plan starts the search",
        ]
    )


def _slower(plan: Plan) -> list[str]:
    """What the minutes leave out.

    Times that of int4-g64 with 1024 x 1024 weights, one thread: iq3_* 2, q*_* and iq4_* 3 to 5,
    iq2_xxs 5, iq2_xs 10, iq2_s 17.
    """
    n_types = len(plan.ggml_formats)
    if not n_types:
        return []
    return [
        "",
        f"{n_types} of the formats are llama.cpp's and counted as ours: its code takes 2 to 5 "
        "times as long, and up to 20 times for iq2_*",
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"

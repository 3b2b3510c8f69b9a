"""`aq-search`: the best assignment of formats to a model within a budget."""

from typing import Annotated

from cyclopts import Parameter

from alphaquant.cli.application import Command, main_of
from alphaquant.cli.console import Bars, quiet_libraries
from alphaquant.cli.screen import say, screen_width
from alphaquant.specs.search import SearchSpec


def command(
    *,
    spec: Annotated[SearchSpec, Parameter(name="*")],
    plan: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Search number formats for every layer and expert of a model within a budget.

    Prints the front and writes front.json, configs/*.json, best.json, trials.csv, report.md,
    report.html and study.db to --out.

    Args:
        spec: What to search.
        plan: Print what every stage is estimated to take on this machine, and end.
    """
    if plan:
        from alphaquant.commands.search import plan_search
        from alphaquant.commands.searching.plan_text import plan_text

        quiet_libraries()
        with Bars() as bars:
            found = plan_search(spec, progress=bars, tell=bars.tell)
        say(plan_text(found))
        return
    from alphaquant.commands.search import search
    from alphaquant.reports.report import summary_text, trial_line, trial_note

    quiet_libraries()
    with Bars() as bars:
        result = search(
            spec,
            progress=bars,
            on_trial=lambda row: bars.note(trial_line(row), trial_note(row)),
            tell=bars.tell,
        )
    say(summary_text(result, screen_width()))


SEARCH = Command(
    "aq-search", command, "stopped; run the same command again to resume", resumes=True
)
main = main_of(SEARCH)

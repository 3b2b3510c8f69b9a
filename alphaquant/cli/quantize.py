"""`aq-quantize`: the packed checkpoint of a configuration."""

import json
import sys
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from alphaquant.cli.application import Command, main_of
from alphaquant.cli.console import Bars, quiet_libraries
from alphaquant.cli.screen import say
from alphaquant.specs.quantize import QuantizeSpec


def command(
    *,
    spec: Annotated[QuantizeSpec, Parameter(name="*")],
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Prints a JSON summary, and for an export the command that serves it; quantize_report.json in
    --out has a row per matrix.

    Args:
        spec: What to do.
        dry_run: Print the plan and its bits without loading weights.
    """
    if spec.out is None and not dry_run:
        raise CycloptsError(msg="--out is needed unless --dry-run")
    from alphaquant.commands import quantize as commands

    quiet_libraries()
    if dry_run:
        with Bars() as bars:
            plan = commands.dry_run(spec, progress=bars)
        say(commands.plan_text(plan))
        return
    with Bars() as bars:
        result = commands.quantize(spec, progress=bars)
    summary = commands.result_json(result)
    print(json.dumps(summary, indent=1))
    if "run" in summary.get("export", {}):
        say(summary["export"]["run"], sys.stderr)


QUANTIZE = Command(
    "aq-quantize",
    command,
    "stopped; the same command goes on with the layers that are finished",
    resumes=True,
)
main = main_of(QUANTIZE)

"""`aq-compare`: what differs between two configurations of one model."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from alphaquant.cli.application import AsJson, Command, main_of
from alphaquant.cli.console import quiet_libraries
from alphaquant.cli.screen import say, screen_width


def command(
    a: Path,
    b: Path,
    /,
    *,
    model: str | None = None,
    show_all: Annotated[bool, Parameter(name="--all", negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two configurations: bits, formats by role, layer and expert.

    No weights are loaded. The exit code is 0 also where they differ.

    Args:
        a: Configuration, packed checkpoint, or --out of aq-search.
        b: The other one, of the same model.
        model: demo, a local directory, a GGUF file, or a hub id; default the one that A or B
            names.
        show_all: List every matrix that differs.
        as_json: Print JSON instead of tables.
    """
    from alphaquant.commands.compare import compare, comparison_json, comparison_text

    quiet_libraries()
    found = compare(a, b, model)
    if as_json:
        print(json.dumps(comparison_json(found), indent=1))
    else:
        say(comparison_text(found, show_all=show_all, width=screen_width()))


COMPARE = Command("aq-compare", command)
main = main_of(COMPARE)

"""`aq-compare`: what differs between two configurations of one model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import application, quiet_libraries, reported, set_up
from alphaquant.cli.options import Debug
from alphaquant.cli.screen import say, screen_width

First = Annotated[
    Path,
    typer.Argument(metavar="A", help="Configuration, packed checkpoint, or --out of aq-search."),
]
Second = Annotated[Path, typer.Argument(metavar="B", help="The other one, of the same model.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="demo, a local directory, or a hub id; default the model that A or B names."
    ),
]
ShowAll = Annotated[bool, typer.Option("--all", help="List every matrix that differs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def command(
    a: First,
    b: Second,
    model: Model = None,
    show_all: ShowAll = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what differs between two configurations: bits, formats by role, layer and expert.

    No weights are loaded. The exit code is 0 also where they differ.
    """
    set_up(debug)
    with reported(debug, "stopped"):
        from alphaquant.studies.compare import compare, comparison_json, comparison_text

        quiet_libraries()
        found = compare(a, b, model)
        if as_json:
            print(json.dumps(comparison_json(found), indent=1))
        else:
            say(comparison_text(found, show_all=show_all, width=screen_width()))


def main() -> None:
    """Entry point."""
    application(command)()

"""`aq-inspect`: what a configuration means on a model, without loading weights."""

import json
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import application, quiet_libraries, reported, set_up
from alphaquant.cli.options import Debug
from alphaquant.cli.screen import say, screen_width

ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="Configuration, packed checkpoint, or --out of aq-search, whose best.json is read.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="demo, a local directory, or a hub id; default the model that CONFIG names."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Check every file of a packed checkpoint against its sha256, and every scale; prints "
        "one line.",
    ),
]


def command(
    config: ConfigPath,
    model: Model = None,
    as_json: AsJson = False,
    verify: Verify = False,
    debug: Debug = False,
) -> None:
    """Show bits, bytes, formats by role and layer, and which engines load them.

    No weights are loaded: a model's config.json is enough, whatever its size. --verify reads the
    files of a packed checkpoint instead.
    """
    if verify and model is not None:
        raise typer.BadParameter("--verify looks at files only", param_hint="--model")
    set_up(debug)
    with reported(debug, "stopped"):
        if verify:
            from alphaquant.quant.integrity import verify_checkpoint
            from alphaquant.studies.inspect_text import verified_json, verified_text

            checked = verify_checkpoint(config)
            print(json.dumps(verified_json(checked)) if as_json else verified_text(checked))
            return
        from alphaquant.studies.inspect_config import inspect_config
        from alphaquant.studies.inspect_text import inspection_json, inspection_text

        quiet_libraries()
        found = inspect_config(config, model)
        as_text = json.dumps(inspection_json(found), indent=1) if as_json else None
        say(as_text or inspection_text(found, screen_width()))


def main() -> None:
    """Entry point."""
    application(command)()

"""`aq-inspect`: what a configuration means on a model, without loading weights."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from alphaquant.cli.application import AsJson, Command, main_of
from alphaquant.cli.console import Bars, quiet_libraries
from alphaquant.cli.screen import say, screen_width


def command(
    config: Path,
    /,
    *,
    model: str | None = None,
    as_json: AsJson = False,
    verify: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show bits, bytes, formats by role and layer, and which engines load them.

    No weights are loaded: a model's config.json is enough, whatever its size; only a GGUF file is
    decoded first, once. --verify reads the files of a packed checkpoint instead.

    Args:
        config: Configuration, packed checkpoint, or --out of aq-search, whose best.json is read.
        model: demo, a local directory, a GGUF file, or a hub id; default the one that CONFIG
            names.
        as_json: Print JSON instead of tables.
        verify: Check every file of a packed checkpoint against its sha256, and every scale;
            prints one line.
    """
    if verify and model is not None:
        raise CycloptsError(msg="--verify looks at files only; leave out --model")
    if verify:
        from alphaquant.commands.inspect_text import verified_json, verified_text
        from alphaquant.runtime.integrity import verify_checkpoint

        checked = verify_checkpoint(config)
        print(json.dumps(verified_json(checked)) if as_json else verified_text(checked))
        return
    from alphaquant.commands.inspect import inspect_config
    from alphaquant.commands.inspect_text import inspection_json, inspection_text

    quiet_libraries()
    with Bars() as bars:
        found = inspect_config(config, model, bars)
    if as_json:
        say(json.dumps(inspection_json(found), indent=1))
    else:
        say(inspection_text(found, screen_width()))


INSPECT = Command("aq-inspect", command)
main = main_of(INSPECT)

"""`aq-dashboard`: the study of a search in the browser."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.console import application, quiet_libraries, reported, set_up
from alphaquant.cli.options import Debug

Source = Annotated[
    str,
    typer.Argument(
        metavar="DIR|STORAGE", help="The --out of a search, or the storage of its study."
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Storage of the study where it is not that of the directory: sqlite:///FILE, "
        "postgresql://USER@HOST/DATABASE, journal:FILE; default what the search used."
    ),
]
Artifacts = Annotated[
    Path | None,
    typer.Option(help="Directory of the trials' configurations; default DIR/artifacts."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free one.")]
Host = Annotated[
    str,
    typer.Option(
        help="Address to listen on. There is no password: whoever reaches it can read and change "
        "the study."
    ),
]


def command(
    source: Source = "aq-out",
    storage: Storage = None,
    artifacts: Artifacts = None,
    port: Port = 0,
    host: Host = "127.0.0.1",
    debug: Debug = False,
) -> None:
    """Show a study in optuna-dashboard, also while its search is running.

    Prints the address and serves it until Ctrl-C.
    """
    set_up(debug)
    try:
        with reported(debug, "stopped"):
            from alphaquant.studies.dashboard import DashboardSpec, serve
            from alphaquant.studies.storages import is_storage

            quiet_libraries()
            # A page computes importances of parameters, and warns each time where trials are few.
            warnings.filterwarnings("ignore", module=r"optuna\.")
            given = storage or (source if is_storage(source) else None)
            folder = Path("aq-out") if given == source else Path(source)
            serve(DashboardSpec(folder, given, artifacts, host, port), _announce)
    except typer.Exit as stop:
        if stop.exit_code == 130:  # Ctrl-C is how it ends
            raise typer.Exit(0) from stop
        raise


def main() -> None:
    """Entry point."""
    application(command)()


def _announce(address: str) -> None:
    print(address, flush=True)
    print("Ctrl-C stops it", file=sys.stderr)

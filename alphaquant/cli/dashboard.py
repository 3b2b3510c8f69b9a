"""`aq-dashboard`: the study of a search in the browser."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

from alphaquant.cli.application import Command, main_of
from alphaquant.cli.console import quiet_libraries
from alphaquant.specs.check import whole


def command(
    source: str = "aq-out",
    /,
    *,
    storage: str | None = None,
    artifacts: str | None = None,
    port: Annotated[int, whole(0, 65535)] = 0,
    host: str = "127.0.0.1",
) -> None:
    """Show a study in optuna-dashboard, also while its search is running.

    Prints the address and serves it until Ctrl-C.

    Args:
        source: The --out of a search, or the storage of its study.
        storage: Storage of the study where it is not that of the directory: sqlite:///FILE,
            postgresql://USER@HOST/DATABASE, grpc://HOST:PORT, journal:FILE; default what the
            search used.
        artifacts: Directory of the trials' configurations, or s3://BUCKET/PREFIX; default where
            the search of the directory keeps them.
        port: Port to listen on; 0 is any free one.
        host: Address to listen on. There is no password: whoever reaches it can read and change
            the study.
    """
    from alphaquant.commands.dashboard import DashboardSpec, serve
    from alphaquant.studies.store.urls import is_storage

    quiet_libraries()
    # A page computes importances of parameters, and warns each time where trials are few.
    warnings.filterwarnings("ignore", module=r"optuna\.")
    given = storage or (source if is_storage(source) else None)
    folder = Path("aq-out") if given == source else Path(source)
    serve(DashboardSpec(folder, given, artifacts, host, port), _announce)


def _announce(address: str) -> None:
    print(address, flush=True)
    print("Ctrl-C stops it", file=sys.stderr)


DASHBOARD = Command("aq-dashboard", command, stops_well=True)
main = main_of(DASHBOARD)

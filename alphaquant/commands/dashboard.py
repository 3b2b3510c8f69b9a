"""Serves the study of a search in optuna-dashboard, also while the search is running.

What is shown is written by the search: see `alphaquant.reports.notes` and
`alphaquant.reports.decoration`.

The pages need nothing from the network: optuna-dashboard brings its scripts and fonts with it.
"""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna_dashboard import wsgi

from alphaquant.commands.dashboard_guard import Guarded
from alphaquant.errors import ConfigError, StoreError
from alphaquant.studies.store.artifacts import artifact_store, is_bucket
from alphaquant.studies.store.folder import artifacts_of, storage_of
from alphaquant.studies.store.storages import open_storage
from alphaquant.studies.store.study import our_studies
from alphaquant.studies.store.urls import shown_url

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DashboardSpec:
    """What a dashboard is asked to show.

    Attributes:
        source: the directory of a search.
        storage: URL of the study; None for that of the directory.
        artifacts: directory of trials' configurations, or s3://BUCKET/PREFIX; None for where the
            search of the directory keeps them.
        host: name or address that it listens on.
        port: to listen on, 0 for any free one.
    """

    source: Path = Path("aq-out")
    storage: str | None = None
    artifacts: str | Path | None = None
    host: str = "127.0.0.1"
    port: int = 0


def serve(spec: DashboardSpec, announce: Callable[[str], None]) -> None:
    """Serve the dashboard until the process is interrupted.

    Args:
        spec: what and where.
        announce: called with the address as soon as it answers.

    Raises:
        StoreError: there is no search, its study is not there, or it is none of ours.
        ConfigError: the port is taken, or the host is not of this machine.
        KeyboardInterrupt: on Ctrl-C, when everything is closed.
    """
    with open_dashboard(spec) as server:
        announce(address_of(server))
        server.serve_forever()


@contextmanager
def open_dashboard(spec: DashboardSpec) -> Iterator[WSGIServer]:
    """A server that listens and does not serve yet; closed with its storage on leaving.

    Raises:
        AlphaQuantError: see `serve`.
    """
    url = spec.storage or storage_of(spec.source)
    artifacts = spec.artifacts or artifacts_of(spec.source)
    with open_storage(url, must_exist=True) as storage:
        if not our_studies(storage):
            raise StoreError(
                f"{shown_url(url)} has no study of aq-search; give the --storage of a search, or "
                "its --out"
            )
        if not is_bucket(artifacts) and not Path(artifacts).is_dir():
            logger.warning(
                "no artifacts in %s: trials are shown without configurations", artifacts
            )
        app = wsgi(storage, artifact_store(artifacts))
        with _listening(spec, Guarded(app, spec.host)) as server:
            yield server


def address_of(server: WSGIServer) -> str:
    """Where a browser finds it."""
    host, port = server.server_address[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else str(host)
    return f"http://{shown}:{port}/"


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per request, so that a slow page holds up no other."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A request that could not be answered, such as one whose browser went away."""
        logger.debug("request of %s failed", client_address, exc_info=sys.exc_info())


class _Quiet(WSGIRequestHandler):
    """Requests are logged for debugging only; the page asks every few seconds."""

    def log_message(self, format: str, *args: Any) -> None:
        """One line per request."""
        logger.debug(format, *args)

    def get_stderr(self) -> TextIO:
        """Where the server and its application write tracebacks of bad requests."""
        return _DebugLog()


class _DebugLog(io.StringIO):
    """A stream whose lines are logged for debugging."""

    def write(self, text: str) -> int:
        """Log a text."""
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)


def _listening(spec: DashboardSpec, app: Any) -> WSGIServer:
    try:
        return make_server(spec.host, spec.port, app, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {spec.host}, port {spec.port} ({error}); give another --port (0 is "
            "any free one) or --host"
        ) from error

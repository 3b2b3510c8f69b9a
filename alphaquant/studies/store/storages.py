"""Optuna's storages opened and closed in one place, with errors in one line.

The URLs are those of `alphaquant.studies.store.urls`. A study is written by one process at a
time, see `alphaquant.studies.store.study`; readers are never held up.
"""

import logging
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from alphaquant.errors import StoreError
from alphaquant.studies.store.urls import Place, place_of

logger = logging.getLogger(__name__)

SQLITE_SECONDS = 60
"""How long SQLite waits while another process writes: a search and the readers of a dashboard."""

SERVER_SECONDS = 10
"""How long connecting to a server may take."""

_JOURNAL_START = b'{"op_code":'
_BROKEN = (sqlalchemy.exc.SQLAlchemyError, OptunaError)
# What a damaged file or an unreachable server raises while a storage is opened: journals are read
# as they are, so anything that JSON can hold where a record should be.
_UNUSABLE = (
    *(*_BROKEN, ValueError, KeyError, TypeError, AssertionError),
    *(OSError, ImportError, RuntimeError),
)


@contextmanager
def open_storage(url: str, *, must_exist: bool = False) -> Iterator[BaseStorage]:
    """Open a storage; its connections are closed on leaving.

    Args:
        url: see the table in `alphaquant.studies.store.urls`.
        must_exist: whether nothing may be made that is not there, as for readers.

    Raises:
        StoreError: see `check_storage`; or it is damaged, unreachable or, where it must exist,
            absent, also later while it is open.
    """
    place = place_of(url)
    if must_exist and place.path is not None and not place.path.is_file():
        raise StoreError(f"there is no study storage {place.shown}; run aq-search first")
    storage: BaseStorage | None = None
    try:
        with _explained(place, _UNUSABLE):
            storage = _open(place, must_exist)
        with _explained(place, _BROKEN):
            yield storage
    finally:
        _close(storage)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Say in one line what is wrong with a storage that cannot be read as it was opened.

    Raises:
        StoreError: in place of whatever damage raises.
    """
    with _explained(place_of(url), _UNUSABLE):
        yield


def _open(place: Place, must_exist: bool) -> BaseStorage:
    if place.url is None:
        path = str(place.path)
        _check_journal(Path(path), mend=not must_exist)
        return JournalStorage(JournalFileBackend(path))
    if place.kind == "grpc":
        return _open_proxy(place, must_exist)
    url = place.url.render_as_string(hide_password=False)
    options = _engine_options(place)
    _check_tables(place, options, must_exist)
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills templates
    return RDBStorage(template, engine_kwargs=options, skip_table_creation=must_exist)


def _open_proxy(place: Place, must_exist: bool) -> BaseStorage:
    """Optuna's proxy, which answers; a reader needs one that holds something."""
    assert place.url is not None and place.url.host is not None and place.url.port is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = GrpcStorageProxy(host=place.url.host, port=place.url.port)
    try:
        storage.wait_server_ready(SERVER_SECONDS)
        is_empty = must_exist and not storage.get_all_studies()
    except BaseException:
        storage.close()
        raise
    if is_empty:
        storage.close()
        raise StoreError(f"{place.shown} holds no study; run aq-search with this storage first")
    return storage


def _close(storage: BaseStorage | None) -> None:
    """Give back connections; files need no closing."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    elif isinstance(storage, GrpcStorageProxy):
        storage.close()


def _engine_options(place: Place) -> dict[str, Any]:
    """How long to wait for a database."""
    if place.kind == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    assert place.url is not None, "servers have URLs"
    wait = {} if "connect_timeout" in place.url.query else {"connect_timeout": SERVER_SECONDS}
    # A server may drop a connection during a trial that takes minutes.
    return {"connect_args": wait, "pool_pre_ping": True}


def _check_tables(place: Place, options: dict[str, Any], must_exist: bool) -> None:
    """Refuse a database that Optuna has not written, because opening it would write there.

    A new study takes an empty one; PostgreSQL's may hold other tables too.
    """
    assert place.url is not None, "journals have no tables"
    engine = sqlalchemy.create_engine(place.url, **options)
    try:
        tables = sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    if "studies" in tables or (not must_exist and not tables):
        return
    if must_exist:
        raise StoreError(f"{place.shown} holds no study; run aq-search with this storage first")
    if place.kind == "sqlite":
        raise StoreError(
            f"{place.shown} is the database of something else, with tables such as {tables[0]}; "
            "give another --storage"
        )


def _check_journal(path: Path, *, mend: bool) -> None:
    """Refuse a file that is no journal; cut off a last record that was not written to its end.

    Optuna would append the next record to that one, and lose both.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        first = file.readline()
    if not (first.startswith(_JOURNAL_START) and first.endswith(b"\n")):
        raise ValueError("it is no journal of Optuna's")
    content = path.read_bytes()
    if mend and not content.endswith(b"\n"):
        whole = content.rfind(b"\n") + 1
        logger.warning(
            "cut off %d bytes of a half-written record in %s", len(content) - whole, path
        )
        with path.open("rb+") as file:
            file.truncate(whole)


@contextmanager
def _explained(place: Place, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Errors of these kinds as one line, without a password."""
    if place.kind == "grpc":
        from grpc import RpcError

        kinds = (*kinds, RpcError)
    try:
        yield
    except kinds as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Optuna wraps what the database says
            cause = cause.__cause__
        said = (_said(cause).splitlines() or [type(cause).__name__])[0]
        if place.password is not None:
            said = said.replace(place.password, "***")
        raise StoreError(
            f"the study storage {place.shown} cannot be used ({said}); {_remedy(place, cause)}"
        ) from error


def _said(error: BaseException) -> str:
    """What an error says; those of grpc keep it beside a text of many lines."""
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


def _remedy(place: Place, cause: BaseException) -> str:
    """What to do about it; to delete a study is advised only where its file is damaged."""
    if place.kind == "postgresql":
        return (
            "check that the server runs and that user, password and database are right; the same "
            "command resumes"
        )
    if place.kind == "grpc":
        return (
            "check that Optuna's proxy runs there and reaches its database; "
            + "the same command resumes"
        )
    if isinstance(cause, UpdateFinishedTrialError):
        return "something else writes to this study; end that, then the same command resumes"
    if isinstance(cause, OSError | sqlite3.OperationalError):
        return (
            "make sure that the file can be written, that its disk has room and that nothing else "
            "keeps it busy; the same command resumes"
        )
    return (
        f"the file is damaged, or is not a study's: move {place.path} away and run the same "
        "command again: trials are run anew, banks and costs are in the cache"
    )

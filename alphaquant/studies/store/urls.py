"""Optuna's storages by their URL, opened and closed in one place, with errors in one line.

========================================  ======================================================
`sqlite:///study.db`                      a file; the default, `study.db` in a search's directory
`postgresql://user@host/database`         a server; needs the extra `postgresql`
`journal:study.journal`                   a file that only grows; also for network file systems,
                                          where SQLite's locks do not work
========================================  ======================================================

A study is written by one process at a time, see `locked_study`; readers are never held up.

Passwords are used and never shown: not in errors, and not in what `kept_url` gives to be stored.
"""

import hashlib
import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL

from alphaquant.errors import StoreError
from alphaquant.files import locked

logger = logging.getLogger(__name__)

KINDS = ("sqlite", "postgresql", "journal")
"""What a URL may start with; `postgresql+psycopg` is the same as `postgresql`."""

SQLITE_SECONDS = 60
"""How long SQLite waits while another process writes: a search and the readers of a dashboard."""

SERVER_SECONDS = 10
"""How long connecting to a server may take."""

_JOURNAL = "journal:"
_JOURNAL_START = b'{"op_code":'
_NAME_CONNECTION = sqlalchemy.text("SELECT set_config('application_name', :holder, false)")
_TRY_LOCK = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
_FIND_HOLDER = sqlalchemy.text(
    "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
    "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND (l.classid::bigint << 32) | l.objid::bigint = :key"
)
_BROKEN = (sqlalchemy.exc.SQLAlchemyError, OptunaError)
# What a damaged file or an unreachable server raises while a storage is opened: journals are read
# as they are, so anything that JSON can hold where a record should be.
_UNUSABLE = (
    *(*_BROKEN, ValueError, KeyError, TypeError, AssertionError),
    *(OSError, ImportError, RuntimeError),
)


@dataclass(frozen=True)
class _Place:
    """Where a storage is.

    Attributes:
        kind: of `KINDS`.
        url: of a database; None for a journal.
        path: of a file; None for a server and for SQLite in memory.
    """

    kind: str
    url: URL | None
    path: Path | None

    @property
    def password(self) -> str | None:
        """The secret in the URL."""
        if self.url is None:
            return None
        return str(self.url.password or self.url.query.get("password") or "") or None

    @property
    def shown(self) -> str:
        """The URL without its password."""
        if self.url is None:
            return f"{_JOURNAL}{self.path}"
        bare = self.url._replace(password=None).difference_update_query(["password"])
        return bare.render_as_string(hide_password=False)


def is_storage(text: str) -> bool:
    """Whether a text names a storage, rather than a directory."""
    return "://" in text or text.startswith(_JOURNAL)


def sqlite_url(path: Path) -> str:
    """The storage URL of a file, whatever characters its name has."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def check_storage(url: str) -> None:
    """Refuse a storage that a search cannot keep its study in; nothing is opened.

    Raises:
        StoreError: an unknown kind, a URL that cannot be read, a driver that is not installed, a
            database in memory, or a file where none can be.
    """
    place = _place(url)
    if place.kind == "sqlite" and place.path is None:
        raise StoreError(
            f"{place.shown} is a database in memory: the study would be gone at the end; give "
            "sqlite:///FILE, or leave --storage out"
        )
    if place.path is None:
        return
    if not place.path.parent.is_dir():
        raise StoreError(
            f"{place.shown}: there is no directory {place.path.parent}; make it, or give another "
            "--storage"
        )
    if place.path.exists() and not place.path.is_file():
        raise StoreError(f"{place.shown}: {place.path} is no file; give another --storage")


@contextmanager
def locked_study(url: str, name: str) -> Iterator[None]:
    """Keep other searches out of a study while this one works on it.

    A file has a lock file beside it, see `alphaquant.files.locked`. A server gives a lock of
    the connection, which ends with the process or when the connection is lost; a pooler that hands
    one connection to several clients cannot keep it.

    Args:
        url: of the storage.
        name: of the study.

    Raises:
        StoreError: another process works on the study; it is named.
    """
    place, what = _place(url), f"study {name!r} in {shown_url(url)}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    if place.path is not None:
        lock = place.path.with_name(f".{place.path.name}.{digest[:8]}.lock")
        with locked(lock, what, "--study"):
            yield
    elif place.kind == "postgresql":
        with _server_lock(place, what, int(digest[:15], 16)):
            yield
    else:
        yield  # in memory: nobody else sees it


@contextmanager
def _server_lock(place: _Place, what: str, key: int) -> Iterator[None]:
    """PostgreSQL's advisory lock of a key, held by a connection of its own.

    The connection's name is seen in `pg_stat_activity` and says who holds the lock, at most 63
    characters of it.
    """
    assert place.url is not None, "servers have URLs"
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    holder = f"process {os.getpid()} since {started} on {socket.gethostname()}"
    engine = sqlalchemy.create_engine(
        place.url, isolation_level="AUTOCOMMIT", **_engine_options(place)
    )
    try:
        with _explained(place, _UNUSABLE):
            connection = engine.connect()
        with connection:
            with _explained(place, _UNUSABLE):
                values = {"key": key, "holder": holder}
                connection.execute(_NAME_CONNECTION, values)
                is_ours = connection.execute(_TRY_LOCK, values).scalar_one()
                found = None if is_ours else connection.execute(_FIND_HOLDER, values).scalar()
            if not is_ours:
                raise StoreError(
                    f"{what} is in use: {found or 'another process'} works on it; wait until it "
                    "ends, stop it, or give another --study"
                )
            yield
    finally:
        engine.dispose()


def kept_url(url: str) -> str:
    """The URL to be stored for later: without its password, and files by their whole path.

    Raises:
        StoreError: see `check_storage`.
    """
    place = _place(url)
    if place.path is None:
        return place.shown
    whole = place.path.absolute()
    return sqlite_url(whole) if place.kind == "sqlite" else f"{_JOURNAL}{whole}"


@contextmanager
def open_storage(url: str, *, must_exist: bool = False) -> Iterator[BaseStorage]:
    """Open a storage; its connections are closed on leaving.

    Args:
        url: see the table above.
        must_exist: whether nothing may be made that is not there, as for readers.

    Raises:
        StoreError: see `check_storage`; or it is damaged, unreachable or, where it must exist,
            absent, also later while it is open.
    """
    place = _place(url)
    if must_exist and place.path is not None and not place.path.is_file():
        raise StoreError(f"there is no study storage {place.shown}; run aq-search first")
    storage: BaseStorage | None = None
    try:
        with _explained(place, _UNUSABLE):
            storage = _open(place, must_exist)
        with _explained(place, _BROKEN):
            yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Say in one line what is wrong with a storage that cannot be read as it was opened.

    Raises:
        StoreError: in place of whatever damage raises.
    """
    with _explained(_place(url), _UNUSABLE):
        yield


def shown_url(url: str) -> str:
    """The URL without its password, for messages.

    Raises:
        StoreError: see `check_storage`.
    """
    return _place(url).shown


def _place(url: str) -> _Place:
    kind = url.split(":", 1)[0].split("+")[0]
    if kind not in KINDS:
        shown = url if "@" not in url else f"{kind}:..."
        raise StoreError(
            f"the study storage {shown} cannot be used: its kind is not one of "
            f"{', '.join(KINDS)}; give sqlite:///FILE, postgresql://USER@HOST/DATABASE or "
            "journal:FILE"
        )
    if kind == "journal":
        if url == _JOURNAL:
            raise StoreError("journal: names no file; give --storage journal:FILE")
        return _Place(kind, None, Path(url.removeprefix(_JOURNAL)))
    parsed = _parse(url, kind)
    if kind == "sqlite":
        file = parsed.database
        return _Place(kind, parsed, Path(file) if file and file != ":memory:" else None)
    if parsed.drivername == kind:  # SQLAlchemy 2.0 would take another driver
        parsed = parsed.set(drivername="postgresql+psycopg")
    driver = parsed.get_driver_name()
    if find_spec(driver) is None:
        extra = "pip install 'aq-search[postgresql]'" if driver == "psycopg" else "install it"
        raise StoreError(f"{kind} needs the package {driver}, which is absent: {extra}")
    return _Place(kind, parsed, None)


def _parse(url: str, kind: str) -> URL:
    """A database's URL; what cannot be read is not shown, because it may hold a password."""
    try:
        parsed = sqlalchemy.make_url(url)
        has_stray = "@" in (parsed.host or "")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        has_stray = True
    if has_stray:
        raise StoreError(
            f"the {kind} URL of the study storage cannot be read; write it as "
            "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %40 for @ and "
            "%3A for : in names and passwords"
        )
    return parsed


def _open(place: _Place, must_exist: bool) -> BaseStorage:
    if place.url is None:
        path = str(place.path)
        _check_journal(Path(path), mend=not must_exist)
        return JournalStorage(JournalFileBackend(path))
    url = place.url.render_as_string(hide_password=False)
    options = _engine_options(place)
    _check_tables(place, options, must_exist)
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills templates
    return RDBStorage(template, engine_kwargs=options, skip_table_creation=must_exist)


def _engine_options(place: _Place) -> dict[str, Any]:
    """How long to wait for a database."""
    if place.kind == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    assert place.url is not None, "servers have URLs"
    wait = {} if "connect_timeout" in place.url.query else {"connect_timeout": SERVER_SECONDS}
    # A server may drop a connection during a trial that takes minutes.
    return {"connect_args": wait, "pool_pre_ping": True}


def _check_tables(place: _Place, options: dict[str, Any], must_exist: bool) -> None:
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
def _explained(place: _Place, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Errors of these kinds as one line, without a password."""
    try:
        yield
    except kinds as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Optuna wraps what the database says
            cause = cause.__cause__
        said = (str(cause).splitlines() or [type(cause).__name__])[0]
        if place.password is not None:
            said = said.replace(place.password, "***")
        raise StoreError(
            f"the study storage {place.shown} cannot be used ({said}); {_remedy(place, cause)}"
        ) from error


def _remedy(place: _Place, cause: BaseException) -> str:
    """What to do about it; to delete a study is advised only where its file is damaged."""
    if place.kind == "postgresql":
        return (
            "check that the server runs and that user, password and database are right; the same "
            "command resumes"
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

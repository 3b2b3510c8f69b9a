"""URLs of studies: what they may be, how they are shown and kept; nothing is opened here.

========================================  ======================================================
`sqlite:///study.db`                      a file; the default, `study.db` in a search's directory
`postgresql://user@host/database`         a server; needs the extra `postgresql`
`grpc://host:13000`                       Optuna's proxy of another storage; needs the extra `grpc`
`journal:study.journal`                   a file that only grows; also for network file systems,
                                          where SQLite's locks do not work
========================================  ======================================================

Passwords are used and never shown: not in errors, and not in what `kept_url` gives to be stored.
`alphaquant.studies.store.storages` opens them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy
import sqlalchemy.exc
from sqlalchemy.engine import URL

from alphaquant.errors import StoreError

KINDS = ("sqlite", "postgresql", "grpc", "journal")
"""What a URL may start with; `postgresql+psycopg` is the same as `postgresql`."""

PROXY_PORT = 13000
"""Where Optuna's proxy listens unless it is told another port."""

_JOURNAL = "journal:"
_DRIVERS = {"psycopg": "postgresql", "grpc": "grpc"}
"""Packages by the extra that brings them."""


@dataclass(frozen=True)
class Place:
    """Where a storage is.

    Attributes:
        kind: of `KINDS`.
        url: of a database or a proxy; None for a journal.
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


def is_served(url: str) -> bool:
    """Whether a server keeps the storage, which may be away for a while."""
    return place_of(url).kind in ("postgresql", "grpc")


def sqlite_url(path: Path) -> str:
    """The storage URL of a file, whatever characters its name has."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def check_storage(url: str) -> None:
    """Refuse a storage that a search cannot keep its study in; nothing is opened.

    Raises:
        StoreError: an unknown kind, a URL that cannot be read, a driver that is not installed, a
            database in memory, or a file where none can be.
    """
    place = place_of(url)
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


def kept_url(url: str) -> str:
    """The URL to be stored for later: without its password, and files by their whole path.

    Raises:
        StoreError: see `check_storage`.
    """
    place = place_of(url)
    if place.path is None:
        return place.shown
    whole = place.path.absolute()
    return sqlite_url(whole) if place.kind == "sqlite" else f"{_JOURNAL}{whole}"


def shown_url(url: str) -> str:
    """The URL without its password, for messages.

    Raises:
        StoreError: see `check_storage`.
    """
    return place_of(url).shown


def place_of(url: str) -> Place:
    """Where the storage of a URL is.

    Raises:
        StoreError: see `check_storage`.
    """
    kind = url.split(":", 1)[0].split("+")[0]
    if kind not in KINDS:
        shown = url if "@" not in url else f"{kind}:..."
        raise StoreError(
            f"the study storage {shown} cannot be used: its kind is not one of "
            f"{', '.join(KINDS)}; give sqlite:///FILE, postgresql://USER@HOST/DATABASE, "
            "grpc://HOST:PORT or journal:FILE"
        )
    if kind == "journal":
        if url == _JOURNAL:
            raise StoreError("journal: names no file; give --storage journal:FILE")
        return Place(kind, None, Path(url.removeprefix(_JOURNAL)))
    parsed = _parsed(url, kind)
    if kind == "sqlite":
        file = parsed.database
        return Place(kind, parsed, Path(file) if file and file != ":memory:" else None)
    if kind == "grpc":
        return Place(kind, _proxy(parsed), None)
    if parsed.drivername == kind:  # SQLAlchemy 2.0 would take another driver
        parsed = parsed.set(drivername="postgresql+psycopg")
    _check_package(kind, parsed.get_driver_name())
    return Place(kind, parsed, None)


def _proxy(parsed: URL) -> URL:
    """The URL of a proxy, with its port.

    Raises:
        StoreError: it has more than a host and a port, or grpc is not installed.
    """
    bare = URL.create("grpc", host=parsed.host, port=parsed.port or PROXY_PORT)
    if not parsed.host or bare != parsed.set(port=bare.port):
        raise StoreError(
            "the grpc URL of the study storage is not a host with a port alone; a proxy asks for "
            f"no user and has one database: give grpc://HOST:PORT, {PROXY_PORT} by default"
        )
    _check_package("grpc", "grpc")
    return bare


def _check_package(kind: str, package: str) -> None:
    """Refuse what is not installed, naming the extra that brings it."""
    if find_spec(package) is None:
        extra = _DRIVERS.get(package)
        how = "install it" if extra is None else f"pip install 'aq-search[{extra}]'"
        raise StoreError(f"{kind} needs the package {package}, which is absent: {how}")


def _parsed(url: str, kind: str) -> URL:
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

"""Every storage that a study can be kept in, with the servers that they need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from alphaquant.studies.store.urls import sqlite_url
from alphaquant.testing.storages.servers import (
    BINARIES,
    PostgresServer,
    Proxy,
    postgres_server,
    storage_proxy,
)


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of this session's own."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed")
    with postgres_server() as running:
        yield running


@pytest.fixture
def database(server: PostgresServer) -> str:
    """URL of an empty database."""
    return server.new_database()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """Optuna's proxy of an SQLite file, in a process of its own."""
    with storage_proxy(sqlite_url(tmp_path / "behind.db")) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql", "grpc", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every storage in turn, empty."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("database"))
    if request.param == "grpc":
        return str(request.getfixturevalue("proxy").url)
    file = tmp_path / "study"
    return sqlite_url(file) if request.param == "sqlite" else f"journal:{file}"

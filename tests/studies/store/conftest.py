"""Every storage that a study can be kept in, with the servers that they need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from alphaquant.studies.store.urls import sqlite_url
from alphaquant.testing.storages.servers import (
    BINARIES,
    PostgresServer,
    Proxies,
    postgres_server,
    storage_proxies,
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


@pytest.fixture(scope="session")
def proxies() -> Iterator[Proxies]:
    """A process with Optuna's proxies."""
    with storage_proxies() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql", "grpc", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every storage in turn, empty."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("database"))
    if request.param == "grpc":
        behind = sqlite_url(tmp_path / "behind.db")
        return str(request.getfixturevalue("proxies").serve(behind))
    file = tmp_path / "study"
    return sqlite_url(file) if request.param == "sqlite" else f"journal:{file}"

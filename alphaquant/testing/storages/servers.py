"""Servers that tests and benchmarks start for themselves: PostgreSQL, and Optuna's storage proxy."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psycopg

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Where Debian and Ubuntu put PostgreSQL, by version; empty where it is not installed."""

_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_PROXY = """
import sys, warnings
warnings.simplefilter("ignore")
from optuna.storages import RDBStorage, get_storage, run_grpc_proxy_server
storage = RDBStorage(sys.argv[1], engine_kwargs={"pool_pre_ping": True})
run_grpc_proxy_server(get_storage(storage), host="127.0.0.1", port=int(sys.argv[2]))
"""


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server of this process's own, on a socket in a folder.

    Attributes:
        folder: its data, log and socket.
    """

    folder: Path

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-c listen_addresses='' -c fsync=off -c max_connections=200 -k {self.folder}"
        self._control("-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """Stop it at once, as a machine does that goes down; what was committed stays."""
        self._control("-m", "immediate", "stop")

    def new_database(self) -> str:
        """The URL of an empty database, with a password that must not be shown."""
        at: dict[str, Any] = {"host": str(self.folder), "user": "tester", "dbname": "postgres"}
        with psycopg.connect(**at, autocommit=True) as connection:
            n_known = len(connection.execute("SELECT 1 FROM pg_database").fetchall())
            connection.execute(f"CREATE DATABASE test{n_known}".encode())
        return f"postgresql://tester:secret@/test{n_known}?host={self.folder}"

    def _control(self, *arguments: str) -> None:
        control = [str(BINARIES[-1] / "pg_ctl"), "-D", str(self.folder / "data"), "-w"]
        command = _as_server_user(*control, *arguments)
        subprocess.run(command, check=True, cwd=self.folder, **_QUIET)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that runs; gone with its data on leaving. `BINARIES` must not be empty."""
    folder = Path(tempfile.mkdtemp(prefix="aq-postgres-", dir="/tmp"))  # sockets have short names
    server = PostgresServer(folder)
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        init = [str(BINARIES[-1] / "initdb"), "-D", str(folder / "data"), "-A", "trust"]
        command = _as_server_user(*init, "-U", "tester", "--no-sync")
        subprocess.run(command, check=True, cwd=folder, **_QUIET)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


def _as_server_user(*command: str) -> list[str]:
    """A command as a user that PostgreSQL accepts: root is refused."""
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    return [*(user if os.getuid() == 0 else []), *command]


@dataclass
class Proxy:
    """Optuna's proxy of a database, in a process of its own.

    Attributes:
        database: its URL, as SQLAlchemy reads it.
        port: where it listens.
    """

    database: str
    port: int = field(default_factory=lambda: _free_port())
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `--storage` takes."""
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-c", _PROXY, self.database, str(self.port)]
        self._process = subprocess.Popen(command, **_QUIET)
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=60)

    def kill(self) -> None:
        """Kill it with -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def storage_proxy(database: str) -> Iterator[Proxy]:
    """A proxy that runs; killed on leaving.

    Args:
        database: URL of an SQLite file or of PostgreSQL with its driver.
    """
    proxy = Proxy(database)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.kill()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])

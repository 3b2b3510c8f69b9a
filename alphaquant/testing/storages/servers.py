"""Servers that tests and benchmarks start: PostgreSQL, and Optuna's storage proxy."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psycopg

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Where Debian and Ubuntu put PostgreSQL, by version; empty where it is not installed."""

_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_PROXIES = """
import sys, threading, warnings
warnings.simplefilter("ignore")
from optuna.storages import RDBStorage, get_storage, run_grpc_proxy_server
for line in sys.stdin:
    port, url = line.rstrip().split(" ", 1)
    storage = get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    at = {"host": "127.0.0.1", "port": int(port)}
    threading.Thread(target=run_grpc_proxy_server, args=(storage,), kwargs=at, daemon=True).start()
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
class Proxies:
    """Optuna's proxies of databases, in one process of their own."""

    _process: subprocess.Popen[str] | None = None

    def serve(self, database: str, port: int | None = None) -> str:
        """The URL of a proxy that answers.

        Args:
            database: URL of an SQLite file or of PostgreSQL with its driver.
            port: where it listens; None for any free one.
        """
        if self._process is None:
            command = [sys.executable, "-c", _PROXIES]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, bufsize=1, **_QUIET
            )
        assert self._process.stdin is not None
        port = port or _free_port()
        self._process.stdin.write(f"{port} {database}\n")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        return f"grpc://127.0.0.1:{port}"

    def kill(self) -> None:
        """Kill them all with -9; the next one gets another process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def storage_proxies() -> Iterator[Proxies]:
    """Proxies that are killed on leaving."""
    proxies = Proxies()
    try:
        yield proxies
    finally:
        proxies.kill()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])

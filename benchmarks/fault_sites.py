"""What a search stands on, and what can be done to it; see `faults.py`.

A site has a disk of its own for cache and results, a storage behind a proxy, and for Ray a cluster
of two nodes on this machine. The study is in PostgreSQL where workers are processes and that is
installed, else in an SQLite file on the disk that is filled.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import SMALL_STORE, ray_nodes

from alphaquant.studies.store.urls import sqlite_url
from alphaquant.testing.storages.disks import SmallDisk, small_disk
from alphaquant.testing.storages.servers import (
    BINARIES,
    PostgresServer,
    Proxies,
    postgres_server,
    storage_proxies,
)

DISK = "1g"
"""Only what is on it takes memory."""
FULL_SECONDS = 20.0
"""How long a disk stays full where the driver does not end: it waits for a storage on it."""


@dataclass
class Storage:
    """Study storages behind Optuna's proxy, one after the other; each stays at its address.

    Attributes:
        proxies: the process of the proxy.
        server: of the databases; None for files.
        folder: of the files.
        behind: URL of the database in use.
        url: of its proxy.
    """

    proxies: Proxies
    server: PostgresServer | None
    folder: Path
    behind: str = ""
    url: str = ""

    def renew(self, name: str) -> str:
        """The URL of an empty one."""
        if self.server is not None:
            fresh = self.server.new_database()
            self.behind = fresh.replace("postgresql:", "postgresql+psycopg:", 1)
        else:
            self.behind = sqlite_url(self.folder / f"{name}.db")
        self.url = self.proxies.serve(self.behind)
        return self.url

    def restart(self, draw: random.Random, down: float) -> str:
        """Stop the proxy or the server of the database at once, and start it again.

        Args:
            draw: chooses between the two.
            down: seconds between.

        Returns:
            Which it was.
        """
        if self.server is not None and draw.random() < 0.5:
            self.server.stop()
            time.sleep(down)
            self.server.start()
            return "PostgreSQL"
        self.proxies.kill()
        time.sleep(down)
        self.proxies.serve(self.behind, int(self.url.rsplit(":", 1)[1]))
        return "proxy"


@dataclass
class Site:
    """See above.

    Attributes:
        disk: where cache and results are.
        storage: where the study is.
        cluster: Ray's; None where workers are processes.
    """

    disk: SmallDisk
    storage: Storage
    cluster: Any

    @property
    def workers_options(self) -> list[str]:
        """Options of aq-search, for workers."""
        if self.cluster is None:
            return ["--workers", "2"]
        return ["--cluster", str(self.cluster.address)]

    def harm(self, kind: str, driver: int, draw: random.Random, down: float) -> str | None:
        """Do it, and put back what a search needs.

        Args:
            kind: of the fault.
            driver: number of its process.
            draw: chooses what is hit.
            down: seconds until what was stopped comes back.

        Returns:
            What was hit; None where there was nothing to hit.
        """
        harms: dict[str, Callable[[], str | None]] = {
            "worker": lambda: kill_one(self.workers(driver), draw),
            "node": lambda: self.lose_node(draw, down),
            "driver": lambda: kill_one([driver], draw),
            "storage": lambda: self.storage.restart(draw, down),
            "disk": lambda: self.fill_disk(driver),
        }
        return harms[kind]()

    def workers(self, driver: int) -> list[int]:
        """Processes that work for a driver."""
        if self.cluster is None:
            return children_of([driver], b"alphaquant.work.worker")
        raylets = [
            info.process.pid
            for node in self.cluster.list_all_nodes()
            for info in node.all_processes.get("raylet", [])
        ]
        return children_of(raylets, b"ray::Worker")

    def lose_node(self, draw: random.Random, down: float) -> str | None:
        """Kill all processes of a node, and let another one join later."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: str(node.unique_id))
        if not nodes:
            return None
        self.cluster.remove_node(draw.choice(nodes), allow_graceful=False)
        time.sleep(down)
        self.cluster.add_node(num_cpus=1, **SMALL_STORE)
        return "node"

    def fill_disk(self, driver: int) -> str:
        """Leave no byte free until the driver has ended, or for a while."""
        self.disk.fill()
        until = time.monotonic() + FULL_SECONDS
        while time.monotonic() < until and not has_ended(driver):
            time.sleep(0.1)
        self.disk.resize(DISK)
        return "disk"


@contextmanager
def open_site(folder: Path, *, is_ray: bool) -> Iterator[Site]:
    """A site for searches, one after the other.

    Args:
        folder: for what it keeps.
        is_ray: workers are those of a Ray cluster, instead of two processes.

    Raises:
        NoDiskError: no disk can be mounted here.
    """
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk", DISK))
        has_server = bool(BINARIES) and not is_ray
        server = stack.enter_context(postgres_server()) if has_server else None
        storage = Storage(stack.enter_context(storage_proxies()), server, disk.folder)
        yield Site(disk, storage, stack.enter_context(ray_nodes(2)) if is_ray else None)


def children_of(parents: Sequence[int], word: bytes) -> list[int]:
    """Processes that were started by others, and whose command has a word, by number."""
    found = []
    for place in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if not place.name.isdecimal() or word not in (place / "cmdline").read_bytes():
                continue
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found += [int(place.name)] if parent in parents else []
    return sorted(found)


def kill_one(processes: Sequence[int], draw: random.Random) -> str | None:
    """Kill one of these with -9; None where there is none."""
    if not processes:
        return None
    with suppress(ProcessLookupError):
        os.kill(draw.choice(processes), signal.SIGKILL)
    return "process"


def has_ended(process: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its end yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state in "ZX"

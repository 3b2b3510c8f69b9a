"""Many clients of one study: trials per second, and that none is lost or doubled.

A search has one driver. This asks what a storage bears if many work on one study: each client is
a process of its own that asks for trials, sets a parameter and two attributes, and tells them.
All are of this machine, over loopback or one disk, and clients have nothing else to do, so they
meet far more often than those of a search that measures for seconds.

Afterwards every trial that a client told must be in the study once, complete, with the value that
it was told, and numbers must have no gaps.

    python benchmarks/storage_clients.py
    python benchmarks/storage_clients.py --out benchmarks/results/storage_clients.json
    python benchmarks/storage_clients.py --kinds journal --clients 1 4 --trials 16

Starts PostgreSQL where it is installed, and Optuna's proxy of an SQLite file. Prints a table in
Markdown; writes JSON with provenance only where `--out` is given.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import get_storage
from optuna.trial import TrialState
from release import run_facts

from alphaquant.reports.tables import markdown
from alphaquant.studies.store.storages import open_storage
from alphaquant.studies.store.urls import sqlite_url
from alphaquant.testing.storages.servers import BINARIES, postgres_server, storage_proxies

KINDS = ("journal", "postgresql", "sqlite", "grpc")
CLIENTS = (1, 64)
TRIALS = 128
SECONDS = 600.0
"""How long the clients of one run may take."""


@dataclass(frozen=True)
class Clients:
    """One run.

    Attributes:
        kind: of the storage.
        n_clients: processes.
        n_trials: of all of them.
        seconds: from the start of the first to the end of the last.
        trials_per_second: of all of them.
        ratio: to those of one client of the same storage.
        n_lost: trials that were told and are not in the study as they were told.
        n_doubled: trials that are there more than once.
        n_failed: clients that ended with an error.
    """

    kind: str
    n_clients: int
    n_trials: int
    seconds: float
    trials_per_second: float
    ratio: float
    n_lost: int
    n_doubled: int
    n_failed: int


@contextmanager
def storage_of(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty storage of a kind, with what serves it."""
    if kind == "postgresql":
        with postgres_server() as server:
            yield server.new_database()
    elif kind == "grpc":
        with storage_proxies() as proxies:
            yield proxies.serve(sqlite_url(folder / "behind.db"))
    else:
        file = folder / "study"
        yield sqlite_url(file) if kind == "sqlite" else f"journal:{file}"


def work(url: str, client: int, n_trials: int, begin: Any) -> None:
    """What one client does, in its own process."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with open_storage(url) as storage:
        sampler = optuna.samplers.RandomSampler(seed=client)
        study = optuna.load_study(study_name="s", storage=get_storage(storage), sampler=sampler)
        begin.wait()
        for step in range(n_trials):
            trial = study.ask()
            x = trial.suggest_float("x", 0, 1)
            trial.set_user_attr("client", client)
            trial.set_user_attr("step", step)
            study.tell(trial, x)


def run_clients(url: str, kind: str, n_clients: int, n_trials: int) -> Clients:
    """Let clients work on a new study in an empty storage, and count what is there afterwards."""
    with open_storage(url) as storage:
        optuna.create_study(storage=storage, study_name="s")
    fork = get_context("fork")  # 64 times the imports would take minutes and gigabytes
    begin, share = fork.Barrier(n_clients + 1), n_trials // n_clients
    processes = [
        fork.Process(target=work, args=(url, client, share, begin)) for client in range(n_clients)
    ]
    for process in processes:
        process.start()
    begin.wait(SECONDS)
    began = time.perf_counter()
    for process in processes:
        process.join(max(1.0, SECONDS - (time.perf_counter() - began)))
    seconds = time.perf_counter() - began
    n_failed = sum(process.exitcode != 0 for process in processes)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    n_all = share * n_clients
    n_lost, n_doubled = counted(url, n_clients, share)
    return Clients(
        *(kind, n_clients, n_all, seconds, n_all / seconds, 1.0, n_lost, n_doubled, n_failed)
    )


def counted(url: str, n_clients: int, share: int) -> tuple[int, int]:
    """Trials that are lost, and that are there twice, of all that the clients told."""
    with open_storage(url, must_exist=True) as storage:
        trials = optuna.load_study(study_name="s", storage=storage).trials
    told = Counter(
        (t.user_attrs.get("client"), t.user_attrs.get("step"))
        for t in trials
        if t.state == TrialState.COMPLETE and t.values == [t.params["x"]]
    )
    wanted = {(client, step) for client in range(n_clients) for step in range(share)}
    n_doubled = sum(n - 1 for n in told.values()) + len(told.keys() - wanted)
    numbers = sorted(t.number for t in trials)
    n_doubled += len(numbers) - len(set(numbers))
    return len(wanted - told.keys()), n_doubled


def measure(kinds: Sequence[str], clients: Sequence[int], n_trials: int) -> list[Clients]:
    """Every kind with every number of clients, each on an empty storage."""
    found: list[Clients] = []
    for kind in kinds:
        rates: list[float] = []
        for n_clients in clients:
            with tempfile.TemporaryDirectory() as folder, storage_of(kind, Path(folder)) as url:
                row = run_clients(url, kind, n_clients, n_trials)
            rates.append(row.trials_per_second)
            found.append(replace(row, ratio=row.trials_per_second / rates[0]))
            print(f"{kind}, {n_clients} clients: {row.seconds:.1f} s", file=sys.stderr)
    return found


def table(rows: Sequence[Clients]) -> str:
    """The runs in Markdown."""
    header = ["storage", "clients", "trials", "trials/s", "of one client", "lost", "doubled"]
    return markdown(
        header,
        [
            [
                *(row.kind, str(row.n_clients), str(row.n_trials)),
                *(f"{row.trials_per_second:.1f}", f"{row.ratio:.2f}"),
                *(str(row.n_lost), str(row.n_doubled)),
            ]
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--trials", type=int, default=TRIALS, help="of all clients together")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = [kind for kind in asked.kinds if kind != "postgresql" or BINARIES]
    began = time.perf_counter()
    rows = measure(kinds, asked.clients, asked.trials)
    print(table(rows))
    if asked.out is not None:
        words = ["FILE" if word == str(asked.out) else word for word in arguments or sys.argv[1:]]
        command = shlex.join(["python", "benchmarks/storage_clients.py", *words])
        content = {**run_facts("cpu"), "command": command, "seconds": time.perf_counter() - began}
        content["runs"] = [asdict(row) for row in rows]
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

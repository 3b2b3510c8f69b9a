"""Searches with faults of five kinds at random moments: is anything lost, doubled or damaged?

    python benchmarks/faults.py --json benchmarks/results/faults-demo.json
    python benchmarks/faults.py --processes worker=1,driver=1 --ray "" -- --model DIR ...

First one process searches without faults. Then searches with two workers, processes at first and
a Ray cluster of two nodes then, suffer faults in an order and at moments that a seed decides:

    worker    one process that works is killed with -9
    node      all of a Ray node are killed with -9, and another one joins
    driver    aq-search itself is killed with -9, and the same command is started again
    storage   the storage proxy, or the PostgreSQL behind it, is killed and comes back
    disk      the disk of cache and results is full until the driver has ended

The same command is started again as often as it ends before its search does; an end that is not
told in one line is counted. Searches follow each other until all faults are made. Each is then
compared with the one without faults: every trial in the storage, the front and configurations,
the bytes of banks, costs and predictions, and all checksums of the cache.

A fault comes at a random moment within `--pace` seconds after the first task that is finished
after the fault before it; one in four comes sooner, counted from that fault itself, and may hit
what still recovers. What stands behind `--` is given to aq-search, in place of a small search of
the demo.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from fault_log import KINDS, Fault, Log, Made, counts_of, drawn
from fault_sites import Site, open_site
from release import run_facts
from workers import files_of, results_of

from alphaquant.commands.cache import list_cache, verify_cache
from alphaquant.reports.tables import markdown
from alphaquant.studies.store.folder import default_storage
from alphaquant.studies.store.storages import open_storage
from alphaquant.studies.store.study import finished_rows

PROCESSES = "worker=6,driver=4,storage=6,disk=4"
RAY = "node=7,worker=3,driver=3,storage=4,disk=3"
DEMO = (
    *("--budget", "4.25bits", "--effort", "quick", "--formats", "int2-g64,int4-g64,mxfp4"),
    *("--calibration-samples", "8", "--evaluation-samples", "8", "--heldout-samples", "4"),
    *("--trials", "14"),
)
PACE = 10.0
STUDY = "aq-search"
"""Name of studies where none was asked for."""
_JOIN_SECONDS = 20.0
_SUMMED = {
    **{"n_faults": "faults", "n_starts": "starts", "n_trials": "trials", "n_lost": "lost"},
    **{"n_doubled": "doubled", "n_again": "made again", "n_damaged": "damaged files"},
    "n_untold": "untold ends",
}
_SAME = {"same_results": "same front", "same_files": "same files"}
"""What is told of searches, and how it is headed."""
_COMMAND = """
import logging
logging.getLogger("alphaquant.work.scheduling").setLevel(logging.DEBUG)
from alphaquant.cli.search import main
main()
"""
"""Tells tasks as `--debug` does, and errors as without it."""


def run_search(
    log: Log,
    options: Sequence[str],
    faults: deque[Fault],
    pace: float,
    suffer: Callable[[Fault, int], bool],
) -> None:
    """Run one search to its end, with as many faults as find a time in it.

    Args:
        log: filled.
        options: of aq-search.
        faults: the next ones; those that were made are taken from it.
        pace: seconds in which the next fault comes.
        suffer: makes a fault; whether there was something to hit. Given the driver's number.
    """
    while True:
        first, log.n_starts = len(log.lines), log.n_starts + 1
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *options],
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
        )
        reader = threading.Thread(target=_read, args=(process, log, log.n_starts), daemon=True)
        reader.start()
        while process.poll() is None:
            time.sleep(0.05)
            if faults and log.is_due(faults[0], pace) and suffer(faults[0], process.pid):
                faults.popleft()
        reader.join(_JOIN_SECONDS)  # workers of one that was killed say their last
        if process.returncode == 0:
            return
        log.ended(process.returncode, first)


def _read(process: "subprocess.Popen[str]", log: Log, start: int) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            log.add(line.rstrip("\n"), start)


@dataclass(frozen=True)
class Found:
    """What a search left.

    Attributes:
        results: digest of trials, front and configurations.
        files: digest of banks, costs and predictions.
        trials: every finished trial of the storage, as text, without its seconds.
        damaged: files of the cache that do not have their checksums, and JSON that is none.
        seconds: that it took.
    """

    results: str
    files: str
    trials: Counter[str]
    damaged: tuple[str, ...]
    seconds: float


def found_in(root: Path, url: str, seconds: float) -> Found:
    """Read what a search left in `cache` and `out` of a folder, and its study."""
    with open_storage(url, must_exist=True) as storage:
        rows = finished_rows(optuna.load_study(study_name=STUDY, storage=storage))
    trials = Counter(json.dumps({**asdict(row), "seconds": 0}) for row in rows)
    damaged = [
        str(file)
        for checked in verify_cache(list_cache(root / "cache"))
        for file in checked.damaged
    ]
    for file in sorted((root / "out").rglob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            damaged.append(str(file))
    return Found(results_of(root), files_of(root), trials, tuple(damaged), seconds)


@dataclass(frozen=True)
class Checked:
    """A search with faults beside the one without.

    Attributes:
        who: whose workers.
        n_faults: it suffered.
        n_starts: of the command.
        n_trials: in its study.
        n_lost: trials of the one without faults that are not in its study.
        n_doubled: trials of its study that are not in the one without faults.
        n_again: trials that were finished more than once.
        n_damaged: files.
        n_untold: ends of the command that were not told in one line.
        same_results: trials, front and configurations are the same.
        same_files: banks, costs and predictions are the same.
        seconds: that it took.
    """

    who: str
    n_faults: int
    n_starts: int
    n_trials: int
    n_lost: int
    n_doubled: int
    n_again: int
    n_damaged: int
    n_untold: int
    same_results: bool
    same_files: bool
    seconds: float


def checked(log: Log, found: Found, plain: Found) -> Checked:
    """Compare a search with the one without faults."""
    return Checked(
        who=log.who,
        n_faults=len(log.faults),
        n_starts=log.n_starts,
        n_trials=found.trials.total(),
        n_lost=(plain.trials - found.trials).total(),
        n_doubled=(found.trials - plain.trials).total(),
        n_again=log.n_again,
        n_damaged=len(found.damaged),
        n_untold=len(log.untold),
        same_results=found.results == plain.results,
        same_files=found.files == plain.files,
        seconds=round(found.seconds, 1),
    )


def search_plainly(root: Path, options: Sequence[str]) -> Found:
    """The search without faults, by one process."""
    log, out = Log("one process"), root / "out"
    places = ("--cache", str(root / "cache"), "--out", str(out))
    run_search(log, (*options, *places), deque(), 1.0, lambda fault, driver: False)
    return found_in(root, default_storage(out), log.second)


@dataclass
class Session:
    """Searches with faults, one after the other.

    Attributes:
        options: of aq-search.
        plain: what the search without faults left.
        draw: chooses what happens and when.
        pace: seconds in which the next fault comes.
        faults: that were made.
        searches: that ended.
        untold: ends of the command that were not told in one line.
    """

    options: Sequence[str]
    plain: Found
    draw: random.Random
    pace: float = PACE
    faults: list[Made] = field(default_factory=list)
    searches: list[Checked] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)

    def suffer(self, folder: Path, who: str, counts: Mapping[str, int]) -> Iterator[Checked]:
        """Search until so many faults of each kind were made.

        Args:
            folder: for what the searches stand on.
            who: whose workers: `processes` or `ray`.
            counts: of faults.
        """
        left = drawn(counts, self.draw)
        if not left:
            return
        with open_site(folder, is_ray=who == "ray") as site:
            while left:
                self.searches.append(self._search(site, who, left))
                yield self.searches[-1]

    def _search(self, site: Site, who: str, left: deque[Fault]) -> Checked:
        name, log = f"search-{len(self.searches)}", Log(who)
        root, url = site.disk.folder / name, site.storage.renew(name)
        places = ("--cache", str(root / "cache"), "--out", str(root / "out"), "--storage", url)

        def suffer(fault: Fault, driver: int) -> bool:
            harm = partial(site.harm, fault.kind, driver, self.draw, fault.down)
            is_made = log.suffer(fault, harm)
            if is_made:
                print(log.faults[-1], file=sys.stderr, flush=True)
            return is_made

        options = (*self.options, *site.workers_options, *places)
        run_search(log, options, left, self.pace, suffer)
        self.faults += log.faults
        self.untold += log.untold
        found = found_in(root, url, log.second)
        return checked(log, found, self.plain)

    def content(self) -> dict[str, Any]:
        """For a file."""
        plain = {k: v for k, v in vars(self.plain).items() if k not in ("trials", "damaged")}
        return {
            "options": self.options,
            "without_faults": {**plain, "n_trials": self.plain.trials.total()},
            "searches": [asdict(search) for search in self.searches],
            "faults": [asdict(fault) for fault in self.faults],
            "untold": self.untold,
        }


def tables(faults: Sequence[Made], searches: Sequence[Checked]) -> str:
    """What was done by kind, and what became of the searches, in Markdown."""
    rows = []
    for kind in KINDS:
        made = [fault for fault in faults if fault.kind == kind]
        waits = [fault.until_work for fault in made if fault.until_work is not None]
        n_stages, n_ends = len({f.stage for f in made}), sum(f.n_ends for f in made)
        n_repeated = sum(f.n_repeated for f in made)
        wait = f"{statistics.median(waits):.0f}" if waits else "-"
        row = [kind, *map(str, (len(made), n_stages, n_ends, n_repeated)), wait]
        rows += [row] if made else []
    header = ["fault", "made", "in stages", "ended the command", "tasks run again"]
    by_kind = markdown([*header, "median s until a task was finished"], rows)
    rows = []
    for who in dict.fromkeys(search.who for search in searches):
        own = [search for search in searches if search.who == who]
        sums = [str(sum(getattr(search, name) for search in own)) for name in _SUMMED]
        same = [f"{sum(getattr(s, n) for s in own)} of {len(own)}" for n in _SAME]
        rows.append([who, str(len(own)), *sums, *same])
    header = ["workers", "searches", *_SUMMED.values(), *_SAME.values()]
    return f"{by_kind}\n\n{markdown(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[given.index("--") + 1 :] if "--" in given else list(DEMO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", default=PROCESSES, help="faults where workers are processes"
    )
    parser.add_argument("--ray", default=RAY, help="faults where workers are those of Ray")
    parser.add_argument("--pace", type=float, default=PACE, help="seconds; see above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for all
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    words = ["FILE" if word == str(asked.json) else word for word in given]
    command = shlex.join(["python", "benchmarks/faults.py", *words])
    facts = {**run_facts("cpu"), "command": command, "seed": asked.seed, "pace": asked.pace}
    with tempfile.TemporaryDirectory() as place:
        plain = search_plainly(Path(place) / "plain", options)
        session = Session(options, plain, random.Random(asked.seed), asked.pace)
        print(f"without faults: {plain.seconds:.0f} s, results {plain.results}", file=sys.stderr)
        for who in ("processes", "ray"):
            counts = counts_of(getattr(asked, who))
            for search in session.suffer(Path(place) / who, who, counts):
                print(search, file=sys.stderr, flush=True)
                if asked.json is not None:
                    content = {**facts, **session.content()}
                    asked.json.write_text(json.dumps(content, indent=1) + "\n")
    print(tables(session.faults, session.searches))


if __name__ == "__main__":
    main()

"""Searches with mixed faults: their schedule, what is counted, and a few of them for real."""

import random
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from alphaquant.testing.storages.disks import NoDiskError, small_disk
from tests.benches import import_benchmark

DONE = "DEBUG part 0 of the bank: 0.50 s"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    return import_benchmark("faults")


@pytest.fixture(scope="module")
def logs(faults: ModuleType) -> ModuleType:
    return sys.modules["fault_log"]


@pytest.fixture
def log(logs: ModuleType) -> Any:
    """Of a search that began a minute ago."""
    return logs.Log("processes", began=time.monotonic() - 60)


def test_a_seed_decides_which_faults_come_when(faults: ModuleType) -> None:
    counts = faults.counts_of(faults.RAY)
    first, same, other = (faults.drawn(counts, random.Random(seed)) for seed in (0, 0, 1))
    assert first == same != other
    assert Counter(fault.kind for fault in other) == counts
    assert {fault.is_early for fault in first} == {True, False}
    assert not faults.drawn(faults.counts_of(""), random.Random(0))


def test_the_defaults_are_forty_faults_of_five_kinds(faults: ModuleType) -> None:
    both = [Counter(faults.counts_of(text)) for text in (faults.PROCESSES, faults.RAY)]
    assert (both[0] + both[1]).keys() == set(faults.KINDS)
    assert [counts.total() for counts in both] == [20, 20]
    with pytest.raises(ValueError, match="kinds are worker, node, driver, storage, disk"):
        faults.counts_of("flood=1")


def test_a_fault_waits_for_work_unless_it_is_early(logs: ModuleType, log: Any) -> None:
    late, early = (logs.Fault("worker", 0.5, 1.0, is_early) for is_early in (False, True))
    assert not log.is_due(late, 1.0)
    assert log.is_due(early, 100.0)
    assert not log.is_due(early, 1000.0)
    log.add(DONE, 1)
    assert not log.is_due(late, 100.0)
    assert log.is_due(late, 0.0)
    assert log.suffer(early, lambda: "process")
    assert not log.is_due(late, 0.0)
    assert log.is_due(early, 0.0)


def test_what_follows_a_fault_is_its_own(logs: ModuleType, log: Any) -> None:
    log.add("bank of formats: 1 of 2, 3.0 s", 1)
    log.n_starts = 1
    assert not log.suffer(logs.Fault("node", 0, 0, False), lambda: None)
    assert log.suffer(logs.Fault("worker", 0, 0, False), lambda: "process")
    log.add("WARNING part 0 of the bank: process 7 ended with signal 9; it is run again", 1)
    log.add(DONE, 1)
    assert log.suffer(logs.Fault("driver", 0, 0, False), lambda: "process")
    log.add(DONE, 1)  # read late
    first, second = log.faults
    assert (first.what, first.stage, first.n_repeated) == ("process", "bank of formats", 1)
    assert first.until_work is not None and second.until_work is None
    log.add(DONE, 2)
    assert second.until_work is not None


def test_ends_are_told_in_one_line_or_counted(logs: ModuleType, log: Any) -> None:
    log.suffer(logs.Fault("driver", 0, 0, False), lambda: "process")
    log.ended(-signal.SIGKILL, 0)
    assert (log.untold, log.faults[-1].n_ends) == ([], 0)
    log.suffer(logs.Fault("disk", 0, 0, False), lambda: "disk")
    log.add("error: the disk is full", 2)
    log.ended(1, 0)
    assert (log.untold, log.faults[-1].n_ends) == ([], 1)
    log.ended(-signal.SIGKILL, 0)
    log.add("Traceback (most recent call last):", 3)
    log.ended(1, 0)
    assert len(log.untold) == 2
    log.ended(1, 0)
    with pytest.raises(RuntimeError, match="ends again and again"):
        log.ended(1, 0)


def test_lost_and_doubled_trials_and_damage_are_counted(faults: ModuleType, log: Any) -> None:
    plain = faults.Found("r", "f", Counter(("a", "b", "c")), (), 10.0)
    found = faults.Found("r", "g", Counter(("a", "b", "b")), ("bank.safetensors",), 20.0)
    for line in ("trial 0: knobs", "trial 1: knobs", "trial 1: knobs"):
        log.add(line, 1)
    row = faults.checked(log, found, plain)
    assert (row.n_lost, row.n_doubled, row.n_again, row.n_damaged) == (1, 1, 1, 1)
    assert (row.same_results, row.same_files) == (True, False)
    log.suffer(faults.Fault("disk", 0, 0, False), lambda: "disk")
    text = faults.tables(log.faults, [row])
    assert "| disk | 1 | 1 | 0 | 0 | - |" in text
    assert "| processes | 1 | 0 | 0 | 3 | 1 | 1 | 1 | 1 | 0 | 1 of 1 | 0 of 1 |" in text


def test_a_disk_that_is_filled_takes_no_byte_until_it_grows(tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", "1m"))
        except NoDiskError as error:
            pytest.skip(str(error))
        (disk.folder / "a").write_bytes(bytes(9000))
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "b").write_bytes(bytes(9000))
        disk.resize("1m")
        (disk.folder / "b").write_bytes(bytes(9000))
    assert not (tmp_path / "disk" / "a").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # Ray's own, of files that it leaves open
@pytest.mark.parametrize(
    ("who", "counts"),
    [("processes", "worker=2,driver=1,storage=2,disk=2"), ("ray", "node=2,worker=1,storage=1")],
)
def test_mixed_faults_lose_double_and_damage_nothing(
    who: str,
    counts: str,
    faults: ModuleType,
    tiny: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if who == "ray":
        pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    options = (
        *("--model", str(tiny), "--budget", "5.2bits", "--formats", "int3-g32,int4-g32,int8-row"),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "20"),
        *("--evaluation", str(texts["search"]), "--evaluation-samples", "16"),
        *("--heldout", str(texts["heldout"]), "--heldout-samples", "8"),
        *("--seq-len", "32", "--trials", "14", "--effort", "quick"),
    )
    plain = faults.search_plainly(tmp_path / "plain", options)
    session = faults.Session(options, plain, random.Random(3))
    try:
        searches = list(session.suffer(tmp_path / who, who, faults.counts_of(counts)))
    except NoDiskError as error:
        pytest.skip(str(error))
    assert Counter(fault.kind for fault in session.faults) == faults.counts_of(counts)
    assert session.untold == []
    for search in searches:
        assert (search.n_lost, search.n_doubled, search.n_again, search.n_damaged) == (0, 0, 0, 0)
        assert (search.same_results, search.same_files) == (True, True)
        assert search.n_trials == 14

"""One process works on a thing; what it leaves behind, or a pause, holds the next one up for long.

Patience is a second or less here, so that a test waits for half a second where people wait for
half a minute.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from alphaquant.errors import StoreError
from alphaquant.files import FolderBoard
from alphaquant.lease import PATIENCE_VARIABLE, Claim, Lease, record_of

ROOT = Path(__file__).parents[1]
SHORT = 0.4


class Memory:
    """Claims in memory, as linearizable as a storage; told of each write."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}

    def read(self) -> dict[str, Claim]:
        return dict(self.claims)

    def write(self, token: str, claim: Claim) -> None:
        self.claims[token] = Claim.read(record_of(claim))

    def remove(self, token: str) -> None:
        self.claims.pop(token, None)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, str(SHORT))


@contextmanager
def held(board: Memory | FolderBoard, what: str = "--out q") -> Iterator[Lease]:
    lease = Lease(board, what, "--out")
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def elsewhere(age: float = 0.0) -> Claim:
    """A claim of another host, whose last beat was so many seconds ago."""
    then = time.time() - age
    return replace(Claim.own(), host="far", process=7, place="far away", since=then, beat=then)


def test_a_second_one_is_refused_in_one_line_that_names_the_first() -> None:
    board = Memory()
    with held(board) as lease:
        with pytest.raises(StoreError) as caught, held(board):
            pass
        lease.check()
        assert len(board.claims) == 1
    message = str(caught.value)
    (claim,) = [Claim.own()]
    assert f"--out q is in use: process {claim.process} on {claim.host} since 20" in message
    assert "give another --out; one that is gone is taken over 0.4 s after" in message
    assert "\n" not in message
    assert board.claims == {}


def test_a_claim_of_another_host_that_is_fresh_holds_and_an_old_one_is_taken_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    board = Memory()
    board.claims["far"] = elsewhere()
    with pytest.raises(StoreError, match="process 7 on far"), held(board):
        pass
    board.claims["far"] = elsewhere(age=60)
    began = time.monotonic()
    with held(board):
        assert time.monotonic() - began >= SHORT / 2  # it was watched
        assert "far" not in board.claims
    assert "took --out q over from process 7 on far" in caplog.text
    assert "which gave no sign for 60 s" in caplog.text


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_holder_whose_clock_is_wrong_is_seen_to_be_alive(hours: int) -> None:
    board, over = Memory(), threading.Event()
    board.claims["far"] = elsewhere(age=3600.0 * hours)

    def beat() -> None:
        while not over.wait(SHORT / 8):
            claim = board.claims["far"]
            board.claims["far"] = replace(claim, n_beats=claim.n_beats + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StoreError, match="process 7 on far"), held(board):
            pass
    finally:
        over.set()
        thread.join()
    assert board.claims.keys() == {"far"}


def test_a_claim_of_a_process_that_ended_here_counts_for_nothing() -> None:
    board = Memory()
    ended = subprocess.Popen(["true"])
    ended.wait()
    board.claims["ended"] = replace(Claim.own(), process=ended.pid)
    board.claims["number came again"] = replace(Claim.own(), started="before")
    with held(board):
        assert len(board.claims) == 1


def test_a_claim_that_is_renewed_while_it_is_taken_is_left_alone() -> None:
    board = Memory()
    board.claims["far"] = elsewhere(age=60)
    write = board.write

    def wake(token: str, claim: Claim) -> None:
        write(token, claim)
        if claim.took:  # it was only paused, and wakes just now
            board.claims["far"] = replace(elsewhere(), n_beats=9)

    board.write = wake  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="process 7 on far"), held(board):
        pass
    assert board.claims.keys() == {"far"}


def test_of_many_that_want_it_at_once_one_works_at_a_time() -> None:
    """Eight threads take turns in a folder-like board; two inside at once would be counted."""
    board, inside, worst = Memory(), [], []

    def work(number: int) -> None:
        lease = Lease(board, "it", "--out")
        lease.acquire(waits=True)
        inside.append(number)
        worst.append(len(inside))
        time.sleep(0.002)
        inside.remove(number)
        lease.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert worst == [1] * 8
    assert board.claims == {}


def test_a_claim_of_another_version_is_no_reason_to_go_on() -> None:
    with pytest.raises(StoreError, match="of another version of this program; end the process"):
        Claim.read({"host": "a"})


PAUSED = """
import sys
from pathlib import Path
from alphaquant.errors import StoreError
from alphaquant.files import locked
with locked(Path(sys.argv[1]), "--out q") as lease:
    for line in sys.stdin:
        try:
            lease.check()
        except StoreError as error:
            print(error, flush=True)
            raise SystemExit(1)
        print("held", flush=True)
"""


@contextmanager
def holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lease of a folder."""
    command, pipe = [sys.executable, "-c", PAUSED, str(folder)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_driver_that_was_paused_learns_that_another_one_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "2")
    with holder(tmp_path / "lock") as first:
        first.send_signal(SIGSTOP)
        words = f"process {first.pid} on"
        with pytest.raises(StoreError, match=words), held(FolderBoard(tmp_path / "lock")):
            pass
        time.sleep(2)
        with held(FolderBoard(tmp_path / "lock")) as second:
            first.send_signal(SIGCONT)
            said, _ = first.communicate("\n", timeout=30)
            second.check()
            assert len(list((tmp_path / "lock").iterdir())) == 1
    assert first.returncode == 1
    assert f"--out q was taken over by process {os.getpid()} on" in said
    assert "gave no sign for more than 2 s; it stops here" in said
    assert f"over from process {first.pid}" in caplog.text
    assert not (tmp_path / "lock").exists()


def test_a_driver_that_was_killed_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "60")
    caplog.set_level(logging.INFO, "alphaquant")
    with holder(tmp_path / "lock") as first:
        first.send_signal(SIGKILL)
    began = time.monotonic()
    with held(FolderBoard(tmp_path / "lock")):
        assert time.monotonic() - began < 5
    assert f"process {first.pid} on" in caplog.text


def test_who_waits_gets_it_when_the_first_is_done() -> None:
    board, got = Memory(), []

    def wait() -> None:
        lease = Lease(board, "it", "--out")
        lease.acquire(waits=True)
        got.append(time.monotonic())
        lease.release()

    with held(board):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(SHORT)
        left = time.monotonic()
    thread.join()
    assert got[0] >= left

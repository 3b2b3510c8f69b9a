"""The four storages: one contract, errors in one line, and never a password."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any
from unittest import mock

import optuna
import psycopg
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from alphaquant.errors import StoreError
from alphaquant.lease import PATIENCE_VARIABLE
from alphaquant.search.sampler import PlannedTrial, next_trial
from alphaquant.studies.store import storages
from alphaquant.studies.store import study as study_module
from alphaquant.studies.store.storages import open_storage
from alphaquant.studies.store.study import (
    TrialRow,
    finish_trial,
    finished_rows,
    open_study,
    our_studies,
)
from alphaquant.studies.store.urls import shown_url, sqlite_url
from alphaquant.testing.storages.servers import storage_proxies

ROOT = Path(__file__).parents[3]
ROW = TrialRow(
    *(0, "knobs", "d0", 4.1, 1000, 0.1 + 0.2, 1e-3, (0.1, 1 / 3), 0.9, 60.0, 0.2, None, 1.5)
)


def add_row(study: optuna.Study, row: TrialRow) -> None:
    finish_trial(study, study.ask(), row)


def test_rows_come_back_exactly_after_reopening(url: str) -> None:
    rows = [
        ROW,
        replace(ROW, number=1, digest="d1", gap=0.25, duplicate_of=0),
        replace(ROW, number=2, digest="d2", is_pruned=True),
        replace(ROW, number=3, digest="d3"),
    ]
    with open_study(url, "s", "f") as study:
        for row in rows:
            add_row(study, row)
    with open_study(url, "s", "f") as study:
        assert finished_rows(study) == rows
        assert study.metric_names == ["bits_per_weight", "kl"]


def test_what_is_sorted_by_is_an_attribute_of_its_own(url: str) -> None:
    with open_study(url, "s", "f") as study:
        add_row(study, ROW)
        attrs = study.trials[0].user_attrs
    names = {"origin", "digest", "bits_per_weight", "checkpoint_bytes", "predicted_kl"}
    names |= {"kl", "kl_stderr"}
    assert attrs.keys() == names
    assert {name: attrs[name] for name in names} == {name: asdict(ROW)[name] for name in names}


def test_study_of_another_search_is_refused_and_the_running_trials_of_ours_fail(url: str) -> None:
    with open_study(url, "s", "f") as study:
        study.ask()
    with pytest.raises(StoreError, match="another search") as caught, open_study(url, "s", "g"):
        pass
    assert "secret" not in str(caught.value)
    with open_study(url, "s", "f") as study:
        assert [t.state for t in study.trials] == [TrialState.FAIL]


def test_readers_see_our_studies_and_leave_running_trials_alone(url: str) -> None:
    with open_study(url, "s", "f") as study:
        study.ask()
        with open_storage(url, must_exist=True) as storage:
            optuna.create_study(storage=storage, study_name="somebody's")
            assert our_studies(storage) == ["s"]
        assert [t.state for t in study.trials] == [TrialState.RUNNING]


def test_readers_make_nothing(url: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(StoreError, match="no study|run aq-search first"),
        open_storage(url, must_exist=True),
    ):
        pass
    assert sorted(tmp_path.iterdir()) == before


def propose(study: optuna.Study, number: int) -> optuna.Trial:
    """The next trial, whose KL depends on what the sampler proposed."""
    trial = next_trial(study, PlannedTrial({}, {"origin": "knobs"}), "tpe", 3)
    x = trial.suggest_float("x", 0, 1)
    row = replace(ROW, number=number, digest=f"d{number}", kl=(x - 0.3) ** 2)
    finish_trial(study, trial, replace(row, bits_per_weight=4 + x))
    return trial


def run_until_killed(url: str) -> None:
    """Twelve trials, and a kill while the result of another one is written."""
    with open_study(url, "s", "f") as study:
        for number in range(12):
            propose(study, number)
        trial = next_trial(study, PlannedTrial({}, {"origin": "knobs"}), "tpe", 3)
        trial.suggest_float("x", 0, 1)
        with mock.patch.object(study, "tell", lambda *a, **k: os.kill(os.getpid(), SIGKILL)):
            finish_trial(study, trial, ROW)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_study_goes_on_with_the_trials_of_one_that_was_not(
    url: str, tmp_path: Path
) -> None:
    process = get_context("fork").Process(target=run_until_killed, args=(url,))
    process.start()
    process.join(60)
    assert process.exitcode == -SIGKILL
    with open_study(url, "s", "f") as study:
        assert len(finished_rows(study)) == 12
        for number in range(12, 16):
            propose(study, number)
        resumed = finished_rows(study)
        assert [t.state for t in study.trials].count(TrialState.FAIL) == 1
    with open_study(sqlite_url(tmp_path / "whole.db"), "s", "f") as study:
        for number in range(16):
            propose(study, number)
        assert finished_rows(study) == resumed


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_connections_are_closed_on_leaving(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    is_file = kind == "sqlite"
    url = sqlite_url(tmp_path / "s.db") if is_file else request.getfixturevalue("database")
    with open_storage(url) as storage:
        assert isinstance(storage, RDBStorage)
        pool = storage.engine.pool
        storage.get_all_studies()
    assert storage.engine.pool is not pool  # dispose replaces the pool
    if not is_file:
        with psycopg.connect(url.replace("postgresql:", "postgres:")) as connection:
            (n,) = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            ).fetchone() or (0,)
        assert n == 1


def test_unreachable_server_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://u:secret@/d?host={tmp_path}"
    with (
        pytest.raises(StoreError, match="check that the server runs") as caught,
        open_storage(url),
    ):
        pass
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert shown_url(url) in str(caught.value)


def test_database_that_is_not_there_is_named_without_the_password(database: str) -> None:
    url = database.replace("@/test", "@/none")
    with pytest.raises(StoreError, match='"none.*does not exist') as caught, open_storage(url):
        pass
    assert "secret" not in str(caught.value)


def test_password_in_what_a_database_says_is_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("could not use secret as password")

    monkeypatch.setattr(storages, "_open", fail)
    url = "postgresql://u:secret@h/d"
    with pytest.raises(StoreError, match=r"could not use \*\*\* as") as caught, open_storage(url):
        pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"this is no journal\n",
        b'{"op_code":0}',  # its only record is cut off
        b'{"op_code":0}\n',
        b'{"op_code":99,"worker_id":"a"}\n',
        b'{"op_code":0,"worker_id":"a","study_name":"s"}\n[1]\n',
        b'{"op_code":0\n\xff\n',
    ],
)
def test_damaged_journal_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "s.journal"
    file.write_bytes(content)
    with (
        pytest.raises(StoreError, match="s.journal cannot be used") as caught,
        open_study(f"journal:{file}", "s", "f"),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


def test_half_written_record_of_a_journal_is_cut_off_by_a_search_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "s.journal"
    url = f"journal:{file}"
    with open_study(url, "s", "f") as study:
        add_row(study, ROW)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code":4,"wor')
    with open_storage(url, must_exist=True) as storage:
        assert our_studies(storage) == ["s"]
    assert file.read_bytes() != whole
    with open_study(url, "s", "f") as study:
        assert file.read_bytes().startswith(whole + b'{"op_code":')
        add_row(study, replace(ROW, number=1))
    with open_study(url, "s", "f") as study:
        assert len(finished_rows(study)) == 2
    assert "cut off 17 bytes" in caplog.text


@pytest.mark.parametrize("must_exist", [False, True])
def test_journal_in_a_directory_that_is_not_there(must_exist: bool, tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError),
        open_storage(f"journal:{tmp_path}/no/s", must_exist=must_exist),
    ):
        pass


def read_until_over(url: str, ready: Any) -> None:
    with open_storage(url, must_exist=True) as storage:
        ready.release()
        while not storage.get_all_studies()[0].user_attrs.get("over"):
            storage.get_all_trials(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sqlite_waits_while_somebody_reads(tmp_path: Path) -> None:
    """Two readers ask all the time, and six trials are written between them."""
    url, fork = sqlite_url(tmp_path / "s.db"), get_context("fork")
    ready = fork.Semaphore(0)
    with open_study(url, "s", "f"):
        pass  # nothing of SQLite is open when processes part
    readers = [fork.Process(target=read_until_over, args=(url, ready)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert all(ready.acquire(timeout=60) for _ in readers)
    with open_study(url, "s", "f") as study:
        for number in range(6):
            add_row(study, replace(ROW, number=number))
        study.set_user_attr("over", True)
        assert len(finished_rows(study)) == 6
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0]


HOLDING = """
import sys
sys.path.insert(0, {root!r})
from alphaquant.lease import Lease
from alphaquant.studies.store.guarded import StudyBoard
from alphaquant.studies.store.storages import open_storage
with open_storage({url!r}) as storage:
    board = StudyBoard(storage, storage.get_study_id_from_name("s"))
    Lease(board, "s", "--study").acquire()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_study_in_use_names_its_holder_and_is_free_when_that_is_killed(url: str) -> None:
    with open_study(url, "s", "f"):
        pass
    code = HOLDING.format(root=str(ROOT), url=url)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        words = rf"study 's' in .* is in use: process {holder.pid} .*another --study"
        with pytest.raises(StoreError, match=words) as caught, open_study(url, "s", "f"):
            pass
        assert "secret" not in str(caught.value)
        assert "delete" not in str(caught.value)
        with open_study(url, "another", "f") as study:
            add_row(study, ROW)
        with open_storage(url, must_exist=True) as storage:  # readers are never refused
            assert set(our_studies(storage)) == {"s", "another"}
        holder.kill()
    with open_study(url, "s", "f") as study:
        add_row(study, ROW)
    with open_study(url, "s", "f") as study:
        assert len(finished_rows(study)) == 1


def test_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
    connection.close()
    before = file.read_bytes()
    words = "database of something else, with tables such as photos; give another --storage"
    with pytest.raises(StoreError, match=words), open_study(sqlite_url(file), "s", "f"):
        pass
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_damaged_sqlite_file_is_one_line_with_what_to_do(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "s.db"
    with open_study(sqlite_url(file), "s", "f") as study:
        add_row(study, ROW)
    content = file.read_bytes()
    file.write_bytes(b"no database" * 99 if damage == "garbage" else content[: len(content) // 2])
    words = f"s.db cannot be used .* move {file} away"
    with pytest.raises(StoreError, match=words) as caught, open_study(sqlite_url(file), "s", "f"):
        pass
    assert "\n" not in str(caught.value)


DRIVING = """
import sys, time
import optuna
sys.path.insert(0, {root!r})
optuna.logging.set_verbosity(optuna.logging.ERROR)
from alphaquant.errors import StoreError
from alphaquant.lease import Lease
from alphaquant.studies.store.guarded import GuardedStorage, StudyBoard
from alphaquant.studies.store.storages import open_storage
with open_storage({url!r}) as storage:
    number = storage.get_study_id_from_name("s")
    lease = Lease(StudyBoard(storage, number), "study s", "--study")
    lease.acquire()
    guarded = GuardedStorage(optuna.storages.get_storage(storage), number, lease.check, "it", 0)
    study = optuna.load_study(study_name="s", storage=guarded)
    try:
        while True:
            study.tell(study.ask(), [1.0, 2.0])
            print(len(study.trials), flush=True)
            time.sleep(0.01)
    except StoreError as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_a_driver_that_was_paused_stops_and_harms_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in the middle of its trials, wherever that is, and wakes beside the next."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "2")
    with open_study(url, "s", "f"):
        pass
    command = [sys.executable, "-c", DRIVING.format(root=str(ROOT), url=url)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        before = [int(first.stdout.readline()) for _ in range(5)]
        assert before == [1, 2, 3, 4, 5]
        first.send_signal(SIGSTOP)
        with pytest.raises(StoreError, match=f"in use: process {first.pid} on"):
            open_study(url, "s", "f").__enter__()
        time.sleep(2)
        with open_study(url, "s", "f") as study:
            known = [t for t in study.trials if t.state == TrialState.COMPLETE]
            add_row(study, ROW)
            first.send_signal(SIGCONT)
            said = first.communicate(timeout=60)[0].splitlines()[-1]
            add_row(study, replace(ROW, number=1, digest="d1"))
            after = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert first.returncode == 0
    assert f"was taken over by process {os.getpid()} on" in said
    assert [t.number for t in after[: len(known)]] == [t.number for t in known]
    assert len(after) == len(known) + 2


def restarted_after(stop: Any, start: Any, seconds: float) -> threading.Thread:
    """A server that goes away now and comes back later."""
    stop()
    thread = threading.Timer(seconds, start)
    thread.start()
    return thread


def test_a_proxy_that_restarts_between_two_calls_is_not_noticed(tmp_path: Path) -> None:
    """Its cache is empty then, and Optuna 5.0.0 knows no trial that it has not read again."""
    with storage_proxies() as proxies:
        behind = sqlite_url(tmp_path / "behind.db")
        url = proxies.serve(behind)
        with open_study(url, "s", "f") as study:
            trial = study.ask()
            proxies.kill()
            proxies.serve(behind, int(url.rsplit(":", 1)[1]))
            assert 0 <= trial.suggest_float("x", 0, 1) <= 1
            finish_trial(study, trial, ROW)
            assert len(finished_rows(study)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpc", "postgresql"])
def test_a_server_that_restarts_is_waited_for_and_nothing_is_lost_or_doubled(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ExitStack() as stack:
        if kind == "grpc":
            proxies = stack.enter_context(storage_proxies())
            behind = sqlite_url(tmp_path / "behind.db")
            url = proxies.serve(behind)
            port = int(url.rsplit(":", 1)[1])
            stop, start = proxies.kill, lambda: proxies.serve(behind, port)
        else:
            server = request.getfixturevalue("server")
            url = server.new_database()
            stop, start = server.stop, server.start
        with open_study(url, "s", "f") as study:
            for number in range(6):
                trial = next_trial(study, PlannedTrial({}, {"origin": "knobs"}), "random", 3)
                back = restarted_after(stop, start, 1.0) if number in (1, 3) else None
                trial.suggest_float("x", 0, 1)
                finish_trial(study, trial, replace(ROW, number=number, digest=f"d{number}"))
                if back is not None:
                    back.join()
            assert [row.digest for row in finished_rows(study)] == [f"d{i}" for i in range(6)]
            states = [t.state for t in study.trials]
        assert states == [TrialState.COMPLETE] * 6
        with open_study(url, "s", "f") as study:  # it was given back, and nothing is damaged
            assert len(finished_rows(study)) == 6
    assert caplog.text.count("does not answer; it is tried again for up to 300 s") == 2
    assert caplog.text.count("answers again after") == 2
    assert "secret" not in caplog.text


def test_a_server_that_stays_away_is_given_up_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(study_module, "OUTAGE_SECONDS", 0.5)
    with storage_proxies() as proxies:
        url = proxies.serve(sqlite_url(tmp_path / "behind.db"))
        words = f"{url} cannot be used .*check that Optuna's proxy runs there.*command resumes"
        with pytest.raises(StoreError, match=words) as caught, open_study(url, "s", "f") as study:
            proxies.kill()
            study.ask()
    assert "\n" not in str(caught.value)

"""Workers as processes: order, faults of every kind, and what they leave behind."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphaquant.errors import StoreError
from alphaquant.work.processes import Processes, _ProcessCrew, threads_of, visible_gpus
from alphaquant.work.tasks import WorkError
from tests.work.fake_tasks import FakeTask, open_badly, open_nothing


@pytest.fixture
def workers() -> Iterator[Processes]:
    with Processes(2, open_nothing, silence_seconds=3.0) as found:
        yield found


def run(workers: Processes, tasks: list[FakeTask]) -> list[int]:
    return [number for number, _ in workers.map(tasks)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_results_come_in_the_order_of_the_tasks(workers: Processes, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tasks = [FakeTask(n, tmp_path, seconds=0.3 if n == 0 else 0.0) for n in range(6)]
    found = [n for n, _ in workers.map(tasks, lambda *call: told.append(call))]
    assert found == list(range(6))
    assert told == [(n, 6) for n in range(7)]
    pids = {path.name.split("-")[2] for path in tmp_path.iterdir()}
    assert len(pids) == 2, "both had some"


def test_a_second_round_is_run_by_the_same_processes(workers: Processes, tmp_path: Path) -> None:
    run(workers, [FakeTask(0, tmp_path)])
    pids = workers.pids
    assert run(workers, [FakeTask(1, tmp_path), FakeTask(2, tmp_path)]) == [1, 2]
    assert workers.pids == pids


@pytest.mark.parametrize("deed", ["once die", "once hang", "once stop"])
def test_a_lost_task_is_run_again_and_no_other(
    workers: Processes, tmp_path: Path, deed: str, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [FakeTask(n, tmp_path, deed if n == 1 else "") for n in range(4)]
    assert run(workers, tasks) == [0, 1, 2, 3]
    assert [task.begun() for task in tasks] == [1, 2, 1, 1]
    (message,) = caplog.messages
    assert message.startswith("task 1: process ") and message.endswith("; it is run again")
    why = "ended with signal 9" if "die" in deed else "used no processor time for 3 s"
    assert why in message


def test_a_task_that_is_lost_three_times_is_an_error_with_its_name(
    workers: Processes, tmp_path: Path
) -> None:
    task = FakeTask(7, tmp_path, "die")
    with pytest.raises(WorkError, match=r"^task 7 was lost 3 times, .* signal 9; .*same command"):
        run(workers, [task])
    assert task.begun() == 3
    assert run(workers, [FakeTask(8, tmp_path)]) == [8], "the others go on"


def test_after_a_lack_of_memory_it_is_smaller_and_one_worker_less_is_left(
    workers: Processes, tmp_path: Path
) -> None:
    found = list(workers.map([FakeTask(0, tmp_path, "run_out"), FakeTask(1, tmp_path)]))
    assert found == [(0, True), (1, False)]
    assert workers.n_workers == 1
    assert list(workers.map([FakeTask(2, tmp_path, "run_out")])) == [(2, True)]
    assert workers.n_workers == 1, "the last one is replaced"


def test_where_each_has_a_machine_of_its_own_none_goes_after_a_lack_of_memory(
    workers: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ProcessCrew, "n_together", 1)
    assert list(workers.map([FakeTask(0, tmp_path, "run_out")])) == [(0, True)]
    assert workers.n_workers == 2


def test_an_error_of_the_task_is_raised_as_it_is_and_not_repeated(
    workers: Processes, tmp_path: Path
) -> None:
    task = FakeTask(3, tmp_path, "fail")
    with pytest.raises(StoreError, match="^file 3 is damaged; delete it$"):
        run(workers, [task, FakeTask(4, tmp_path, seconds=30)])
    assert task.begun() == 1
    assert run(workers, [FakeTask(5, tmp_path)]) == [5], "nobody waits for task 4"


def test_a_bug_in_a_task_comes_with_its_place(workers: Processes, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)KeyError.*in a worker.*in err"):
        run(workers, [FakeTask(0, tmp_path, "err")])


def test_a_model_that_cannot_be_opened_is_the_error_of_all(tmp_path: Path) -> None:
    with (
        Processes(2, open_badly) as workers,
        pytest.raises(StoreError, match="^the model is damaged"),
    ):
        run(workers, [FakeTask(0, tmp_path)])


def test_what_workers_print_does_not_reach_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Processes(1, open_nothing) as workers:
        run(workers, [FakeTask(0, tmp_path, "speak")])
    out, err = capfd.readouterr()
    assert out == ""
    assert "a library prints" in err and "so does a program" in err


def test_workers_end_with_the_driver_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from alphaquant.work.processes import Processes\n"
        "from tests.work.fake_tasks import FakeTask, open_nothing\n"
        "workers = Processes(2, open_nothing)\n"
        f"list(workers.map([FakeTask(0, Path({str(tmp_path)!r}))]))\n"
        "print(*workers.pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -9
    pids = [int(text) for text in done.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


def test_no_process_is_left_when_the_workers_are_closed(tmp_path: Path) -> None:
    with Processes(2, open_nothing) as workers:
        results = workers.map([FakeTask(n, tmp_path, seconds=n * 30.0) for n in range(2)])
        next(results)
        pids = workers.pids
    assert not any(map(is_alive, pids))


def test_cores_are_shared_and_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    assert [threads_of(n) for n in (1, 3, 10, 64)] == [10, 3, 1, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert visible_gpus() == ["2", "GPU-5"]

"""Workers as processes of this machine, one per GPU where there are several.

They are started as programs of their own, never forked: CUDA and threads of torch do not survive
that. On the CPU the model's weights are private maps of the same files, so that the memory holds
them once; each worker gets its share of the cores.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from alphaquant.work.crew import Numbered
from alphaquant.work.messages import BEAT_SECONDS, Beat, Outcome, Ready, receive, send
from alphaquant.work.scheduling import Scheduled
from alphaquant.work.tasks import OpenModel, Task, WorkError

SILENCE_SECONDS = 300.0
"""Without processor time for so long a worker counts as hanging. Reading a large model from a
slow disk takes little of it, but some."""

LEAST_SECONDS = 0.01
"""Of processor time between two signs of life: less is no work."""


@dataclass
class _Process:
    """One worker.

    Attributes:
        program: the process.
        line: the socket to it.
        is_open: whether it has opened the model.
        is_busy: whether it has a task.
        alive: when its last sign of life came, seconds of `time.monotonic`.
        seconds: processor time that it had spent then.
    """

    program: subprocess.Popen[bytes]
    line: "Connection[bytes, bytes]"
    is_open: bool = False
    is_busy: bool = False
    alive: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class _ProcessCrew(Numbered[_Process]):
    """See `alphaquant.work.crew.Crew`."""

    look_at = "look at their messages above, and run without --workers"

    def __init__(
        self, n_workers: int, open_model: OpenModel, device: str, silence_seconds: float
    ) -> None:
        self._open, self._device, self._silence = open_model, device, silence_seconds
        self._n_asked = n_workers
        super().__init__(n_workers)

    @property
    def idle(self) -> list[int]:
        """See `Crew`."""
        return [n for n, p in self._members.items() if p.is_open and not p.is_busy]

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes."""
        return [p.program.pid for p in self._members.values()]

    def give(self, worker: int, task: Task[Any]) -> None:
        """See `Crew`."""
        process = self._members[worker]
        process.is_busy, process.alive = True, time.monotonic()
        with suppress(OSError):  # it is gone, which waiting for it tells
            send(process.line, task)

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Crew`."""
        while True:
            lines = {p.line: n for n, p in self._members.items()}
            found: list[tuple[int, Outcome]] = []
            for line in wait(list(lines), BEAT_SECONDS):
                found += self._read(lines[line])  # type: ignore[index]
            found += self._hanging()
            if found or self.idle:
                return found

    def close(self) -> None:
        """End all."""
        idle = self.idle
        for worker in idle:
            with suppress(OSError):
                send(self._members[worker].line, None)
        for worker, process in self._members.items():
            with suppress(subprocess.TimeoutExpired):
                process.program.wait(2 * BEAT_SECONDS if worker in idle else 0)
            self._end(worker)
        self._members.clear()

    def _start(self, number: int) -> _Process:
        ours, theirs = Pipe()
        try:
            program = subprocess.Popen(
                [sys.executable, "-m", "alphaquant.work.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._environment(number),
                start_new_session=True,  # Ctrl-C is for the driver, which ends them
            )
        except OSError as error:
            raise WorkError(f"worker {number} cannot be started ({error})") from error
        finally:
            theirs.close()
        with suppress(OSError):  # it is gone, which waiting for it tells
            send(ours, self._open)
        return _Process(program, ours)

    def _environment(self, number: int) -> dict[str, str]:
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        found.setdefault("OMP_NUM_THREADS", str(threads_of(self._n_asked)))
        if self._device.startswith("cuda"):
            found["CUDA_VISIBLE_DEVICES"] = visible_gpus()[number % len(visible_gpus())]
        return found

    def _read(self, worker: int) -> list[tuple[int, Outcome]]:
        """Take one message of a worker.

        Raises:
            AlphaQuantError: it could not open the model.
        """
        process = self._members[worker]
        try:
            message = receive(process.line)
        except (EOFError, OSError):
            return self._lost(worker, _end_of(process.program))
        if isinstance(message, Beat):
            if message.seconds - process.seconds >= LEAST_SECONDS:
                process.seconds, process.alive = message.seconds, time.monotonic()
        elif isinstance(message, Ready):
            if message.error is not None:
                raise message.error
            process.is_open = True
        else:
            process.is_busy, self._n_starts = False, 0
            return [(worker, message)]
        return []

    def _hanging(self) -> list[tuple[int, Outcome]]:
        """Workers that have a task, or open the model, and show no sign of life."""
        late = time.monotonic() - self._silence
        found = []
        for worker, process in list(self._members.items()):
            if (process.is_busy or not process.is_open) and process.alive < late:
                pid, seconds = process.program.pid, self._silence
                why = f"process {pid} used no processor time for {seconds:g} s"
                found += self._lost(worker, why)
        return found

    def _lost(self, worker: int, reason: str) -> list[tuple[int, Outcome]]:
        process = self._members[worker]
        if process.is_busy:
            self._end(worker)
            return [(worker, Outcome("lost", reason=reason))]
        self.replace(worker)
        return []

    def _end(self, worker: int) -> None:
        process = self._members[worker]
        process.is_busy = process.is_open = False
        process.line.close()
        process.program.kill()
        process.program.wait()


class Processes(Scheduled):
    """Workers on this machine; a context manager, whose end ends them.

    Args:
        n_workers: how many.
        open_model: opens the model in each.
        device: `cpu`, or `cuda` for one GPU per worker.
        silence_seconds: without processor time until a worker counts as hanging.
    """

    def __init__(
        self,
        n_workers: int,
        open_model: OpenModel,
        device: str = "cpu",
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._crew = _ProcessCrew(n_workers, open_model, device, silence_seconds)
        super().__init__(self._crew)

    @property
    def n_together(self) -> int:
        """All of them."""
        return self._crew.n_workers

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes."""
        return self._crew.pids

    def __exit__(self, *error: object) -> None:
        """End them."""
        self._crew.close()


def threads_of(n_workers: int) -> int:
    """Threads of each of so many workers: its share of the cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // n_workers)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` has them."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated:
        return stated.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] or ["0"]


def _end_of(program: subprocess.Popen[bytes]) -> str:
    """How a process ended, a clause."""
    try:
        code = program.wait(BEAT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"process {program.pid} closed its line"
    how = f"with signal {-code}" if code < 0 else f"with code {code}"
    return f"process {program.pid} ended {how}"

"""Handing tasks to workers, and repeating what was lost.

A task is lost when its worker dies, shows no sign of life, or runs out of memory. It is then run
by another worker, three times at most; after a lack of memory it is made smaller, and one worker
less is left where several share the memory. An error of the task itself (a damaged file, a full
disk) is not repeated: it would be the same. What a lost worker wrote half has a name that nobody
reads (`alphaquant.files.whole_file`).
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from alphaquant.work.crew import Crew
from alphaquant.work.messages import Outcome
from alphaquant.work.tasks import R, Task, Tell, WorkError, tell_no_one

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""Times that a task is begun."""


@dataclass
class _Entry:
    """A task that is not done yet."""

    number: int
    task: Task[Any]
    n_begun: int = 0


class Schedule:
    """Runs tasks on a crew.

    Args:
        crew: the workers.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._running: dict[int, _Entry] = {}

    def run(self, tasks: Sequence[Task[R]], tell: Tell) -> Iterator[R]:
        """See `Workers.map`."""
        waiting = deque(_Entry(number, task) for number, task in enumerate(tasks))
        results: dict[int, R] = {}
        n_told = n_given = 0
        self._crew.refill()
        tell(0, len(tasks))
        while n_given < len(tasks):
            for worker in self._crew.idle:
                if waiting:
                    self._begin(worker, waiting.popleft())
            for worker, outcome in self._crew.wait():
                entry = self._running.pop(worker)
                if outcome.kind == "done":
                    results[entry.number] = outcome.value
                    logger.debug("%s: %.2f s", entry.task.name, outcome.seconds)
                    n_told += 1
                    tell(n_told, len(tasks))
                    continue
                waiting.appendleft(self._again(worker, entry, outcome))
            while n_given in results:
                yield results.pop(n_given)
                n_given += 1

    def forget(self) -> None:
        """Let go of workers that still run tasks which nobody waits for."""
        for worker in list(self._running):
            del self._running[worker]
            self._crew.retire(worker)

    def _begin(self, worker: int, entry: _Entry) -> None:
        entry.n_begun += 1
        self._running[worker] = entry
        self._crew.give(worker, entry.task)

    def _again(self, worker: int, entry: _Entry, outcome: Outcome) -> _Entry:
        """The task, to be begun once more; its worker is replaced.

        Raises:
            AlphaQuantError: an error of the task itself, or the last loss that is put up with.
        """
        if outcome.kind == "error":
            raise outcome.value
        is_last = entry.n_begun >= MOST_ATTEMPTS
        logger.warning(
            "%s: %s%s", entry.task.name, outcome.reason, "" if is_last else "; it is run again"
        )
        if is_last:
            self._crew.replace(worker)
            raise WorkError(
                f"{entry.task.name} was lost {entry.n_begun} times, at last because "
                f"{outcome.reason}; {_advice(outcome)}, then run the same command, which goes on "
                "with what is finished"
            )
        if outcome.kind == "memory":
            entry.task = entry.task.smaller()
            if self._crew.n_together > 1:
                self._crew.drop(worker)
                return entry
        self._crew.replace(worker)
        return entry


class Scheduled:
    """What all `Workers` with a crew have in common; a context manager, which gives itself.

    Args:
        crew: the workers.
    """

    def __init__(self, crew: Crew) -> None:
        self._of_all, self._schedule = crew, Schedule(crew)

    @property
    def n_workers(self) -> int:
        """How many are left."""
        return self._of_all.n_workers

    def map(self, tasks: Sequence[Task[R]], tell: Tell = tell_no_one) -> Iterator[R]:
        """See `Workers.map`."""
        try:
            yield from self._schedule.run(tasks, tell)
        finally:
            self._schedule.forget()

    def __enter__(self) -> Self:
        """Itself."""
        return self


def _advice(outcome: Outcome) -> str:
    if outcome.kind == "memory":
        return "give fewer workers, or machines with more memory"
    return "look at the workers' messages above and at the machine's memory"

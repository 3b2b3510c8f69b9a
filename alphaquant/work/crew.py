"""Workers by number: what the schedule asks of them, and how those that end are replaced."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from alphaquant.work.messages import Outcome
from alphaquant.work.tasks import Task, WorkError

W = TypeVar("W")
"""What a kind of crew knows of a worker."""

_MOST_STARTS = 10
"""Workers that are started in the place of others, in a row without a finished task."""


class Crew(Protocol):
    """Workers, each known by a number, to be given one task at a time."""

    @property
    def idle(self) -> list[int]:
        """Numbers of the workers that wait for a task."""

    @property
    def n_workers(self) -> int:
        """How many there are."""

    @property
    def n_together(self) -> int:
        """How many share the memory of a machine, at most."""

    def give(self, worker: int, task: Task[Any]) -> None:
        """Let a worker begin a task."""

    def wait(self) -> list[tuple[int, Outcome]]:
        """Wait until at least one worker is done with its task, in whatever way."""

    def replace(self, worker: int) -> None:
        """Put a new worker in the place of one that is lost or out of memory.

        Raises:
            WorkError: none can be started.
        """

    def drop(self, worker: int) -> None:
        """Let a worker go for good."""

    def retire(self, worker: int) -> None:
        """Let a worker go until `refill`."""

    def refill(self) -> None:
        """Put new workers in the place of retired ones."""


class Numbered(ABC, Generic[W]):
    """The part of a `Crew` that does not depend on what its workers are.

    Attributes:
        look_at: where people find why workers end, a clause.
    """

    look_at: ClassVar[str]

    def __init__(self, n_workers: int) -> None:
        """Start so many; what `_start` reads must be there."""
        self._n_starts, self._retired = 0, set[int]()
        self._members = {number: self._start(number) for number in range(n_workers)}

    @abstractmethod
    def _start(self, number: int) -> W:
        """A new worker, which begins to open the model."""

    @abstractmethod
    def _end(self, worker: int) -> None:
        """End a worker at once, whatever it does."""

    @property
    def n_workers(self) -> int:
        """See `Crew`."""
        return len(self._members)

    @property
    def n_together(self) -> int:
        """See `Crew`."""
        return len(self._members)

    def replace(self, worker: int) -> None:
        """See `Crew`."""
        self._n_starts += 1
        self._end(worker)
        if self._n_starts > _MOST_STARTS:
            raise WorkError(
                f"{self._n_starts} workers ended one after the other without finishing a task; "
                f"{self.look_at}"
            )
        self._members[worker] = self._start(worker)

    def drop(self, worker: int) -> None:
        """See `Crew`."""
        self._end(worker)
        del self._members[worker]

    def retire(self, worker: int) -> None:
        """See `Crew`."""
        if worker in self._members:
            self._end(worker)
            self._retired.add(worker)

    def refill(self) -> None:
        """See `Crew`."""
        for worker in self._retired:
            self._members[worker] = self._start(worker)
        self._retired.clear()

"""What a task is, and who runs tasks.

A task is a pure function of a model that was opened and of a small description, which can be
pickled. It gives small numbers, or writes whole files whose names and contents follow from what it
is given, so that running it twice does no harm. How work is cut into tasks never depends on who
runs them; so neither do results.

`scheduling.py` hands tasks out and repeats what was lost; `processes.py` and `ray_cluster.py` have
the workers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from alphaquant.errors import AlphaQuantError
from alphaquant.models.sites import ModelMap

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

OpenModel = Callable[[], ModelMap]
"""Opens the model in a worker; can be pickled."""

Tell = Callable[[int, int], None]
"""Told how many tasks are done, of how many."""


class WorkError(AlphaQuantError):
    """Workers that cannot be started, or a task that was lost too often."""


class Task(Protocol[R_co]):
    """A piece of work."""

    @property
    def name(self) -> str:
        """For messages: `layer 3 of the bank`."""

    def run(self, model_map: ModelMap) -> R_co:
        """Do it; the model has its own weights afterwards."""

    def smaller(self) -> Self:
        """The same work in less memory, with the same result; itself where that is not possible.

        Taken when a worker ran out of memory.
        """


class Workers(Protocol):
    """Who runs tasks. All have opened the same model."""

    @property
    def n_workers(self) -> int:
        """How many tasks run at the same time."""

    @property
    def n_together(self) -> int:
        """How many of these share the memory of one machine, at most."""

    def map(self, tasks: Sequence[Task[R]], tell: Tell) -> Iterator[R]:
        """Results in the order of the tasks, whatever is finished first.

        Args:
            tasks: any number; handed out in this order.
            tell: told of every task that is done.

        Raises:
            AlphaQuantError: what a task raises, or `WorkError` for one that was lost too often.
        """


def tell_no_one(done: int, total: int) -> None:
    """See `Tell`."""


class InProcess:
    """Runs tasks one after the other in this process: the reference of all others.

    Args:
        model_map: the model.
    """

    n_workers = 1
    n_together = 1

    def __init__(self, model_map: ModelMap) -> None:
        self._map = model_map

    def map(self, tasks: Sequence[Task[R]], tell: Tell = tell_no_one) -> Iterator[R]:
        """See `Workers.map`."""
        for number, task in enumerate(tasks):
            tell(number, len(tasks))
            yield task.run(self._map)
        tell(len(tasks), len(tasks))

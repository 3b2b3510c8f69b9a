"""When faults happen, and what a search said and suffered; see `faults.py`."""

import random
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workers import TASK

KINDS = ("worker", "node", "driver", "storage", "disk")
_EARLY = 0.25
_MOST_ENDS = 4
"""Ends of the command in a row without a fault between: then something else is wrong."""
_STAGE = re.compile(r"^([a-z' -]+): \d+ of \d+")
_TRIAL = re.compile(r"^trial (\d+):")


@dataclass(frozen=True)
class Fault:
    """What is to happen.

    Attributes:
        kind: one of `KINDS`.
        wait: how long after what it waits for, in parts of the pace.
        down: seconds that what was stopped stays away.
        is_early: waits for the fault before, not for a task that is finished after it.
    """

    kind: str
    wait: float
    down: float
    is_early: bool


def drawn(counts: Mapping[str, int], draw: random.Random) -> deque[Fault]:
    """Faults in a random order: so many of each kind."""
    kinds = [kind for kind in KINDS for _ in range(counts.get(kind, 0))]
    draw.shuffle(kinds)
    return deque(
        Fault(kind, draw.uniform(0.0, 1.0), draw.uniform(0.5, 4.0), draw.random() < _EARLY)
        for kind in kinds
    )


def counts_of(text: str) -> dict[str, int]:
    """Numbers of faults: `worker=5,disk=2`.

    Raises:
        ValueError: a kind that there is not.
    """
    found = {
        kind: int(n) for kind, _, n in (part.partition("=") for part in text.split(",") if part)
    }
    if not found.keys() <= set(KINDS):
        raise ValueError(f"{text}: kinds are {', '.join(KINDS)}")
    return found


@dataclass
class Made:
    """A fault that happened.

    Attributes:
        who: whose workers: `processes` or `ray`.
        kind: one of `KINDS`.
        what: was hit.
        start: number of the command that ran, from 1.
        stage: of the search at that time, as it was last told; empty before the first.
        second: of the search.
        n_ends: ends of the command in one line that followed, until the next fault.
        n_repeated: tasks that were lost and given to another worker, until the next fault.
        until_work: seconds until the next task was finished; None where another fault, or the end
            of the search, came first.
    """

    who: str
    kind: str
    what: str
    start: int
    stage: str
    second: float
    n_ends: int = 0
    n_repeated: int = 0
    until_work: float | None = None


@dataclass
class Log:
    """What a search said and suffered, whatever number of commands it took.

    Attributes:
        who: whose workers.
        began: seconds of `time.monotonic`.
        lines: standard error with the second of each line.
        faults: that were made.
        n_starts: of the command.
        untold: ends that were not told in one line: what was said.
        n_in_a_row: ends since the last fault.
    """

    who: str
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    faults: list[Made] = field(default_factory=list)
    n_starts: int = 0
    untold: list[str] = field(default_factory=list)
    n_in_a_row: int = 0
    _stage: str = ""

    def add(self, line: str, start: int) -> None:
        """Take a line of standard error, and the number of the command that wrote it."""
        now = self.second
        self.lines.append((now, line))
        if stage := _STAGE.match(line):
            self._stage = stage[1]
        if not self.faults:
            return
        last = self.faults[-1]
        last.n_repeated += "it is run again" in line
        is_late = last.kind == "driver" and start == last.start  # it was written before
        if TASK.match(line) and last.until_work is None and not is_late:
            last.until_work = now - last.second

    def worked(self) -> float | None:
        """The second when the first task was finished after the last fault; None before that."""
        if self.faults:
            last = self.faults[-1]
            return None if last.until_work is None else last.second + last.until_work
        return next((second for second, line in self.lines if TASK.match(line)), None)

    def is_due(self, fault: Fault, pace: float) -> bool:
        """Whether the time of a fault has come.

        Args:
            fault: the next one.
            pace: seconds.
        """
        last = self.faults[-1].second if self.faults else 0.0
        since = last if fault.is_early else self.worked()
        return since is not None and time.monotonic() - self.began >= since + fault.wait * pace

    def suffer(self, fault: Fault, harm: Callable[[], str | None]) -> bool:
        """Make a fault.

        Args:
            fault: the next one.
            harm: does it; says what was hit, or None where there was nothing to hit.

        Returns:
            Whether there was.
        """
        made = Made(self.who, fault.kind, "", self.n_starts, self._stage, self.second)
        self.faults.append(made)
        what = harm()
        if what is None:
            self.faults.remove(made)
            return False
        made.what, self.n_in_a_row = what, 0
        return True

    def ended(self, code: int, first: int) -> None:
        """Note how the command ended before its search did.

        Args:
            code: its exit code.
            first: number of its first line.

        Raises:
            RuntimeError: it ends again and again.
        """
        said = [line for _, line in self.lines[first:]]
        last = self.faults[-1] if self.faults else None
        is_killed = code == -signal.SIGKILL and last is not None and last.kind == "driver"
        if not is_killed:
            n_errors = sum(line.startswith("error: ") for line in said)
            if code != 1 or n_errors != 1 or any("Traceback" in line for line in said):
                self.untold.append("\n".join([f"code {code}", *said[-40:]]))
            if last is not None:
                last.n_ends += 1
        self.n_in_a_row += 1
        if self.n_in_a_row > _MOST_ENDS:
            raise RuntimeError("\n".join(["the command ends again and again:", *said[-40:]]))

    @property
    def second(self) -> float:
        """Now."""
        return time.monotonic() - self.began

    @property
    def n_again(self) -> int:
        """Trials that were told to be finished more than once."""
        seen = [found[1] for _, line in self.lines if (found := _TRIAL.match(line))]
        return len(seen) - len(set(seen))

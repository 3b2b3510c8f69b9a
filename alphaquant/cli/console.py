"""What all commands share: progress on stderr, errors in one line, exit codes 0, 1, 2 and 130."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType

from cyclopts import CycloptsError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from alphaquant.cli.screen import say
from alphaquant.errors import AlphaQuantError
from alphaquant.progress import Stage, StageTimes

_UNEVEN = (Stage.LOAD,)
"""Stages whose steps differ so much that the last ones say nothing about the next."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal: how long a stage may be silent before its next step is a line."""

_BAR_WIDTH, _NOTE_WIDTH = 58, 80
"""Columns of a terminal from which on there is place for the bar itself, and for a note."""


class Bars:
    """One progress bar per stage on a terminal; elsewhere lines, a few a minute at most.

    A bar has the seconds that its stage took and an estimate of those that are left in it, see
    `alphaquant.progress`; how long stages take that have not begun is not known. Counts
    and times need 49 columns.
    """

    def __init__(self) -> None:
        """Make the display; nothing is shown before the first call."""
        self._times = StageTimes()
        self._console = Console(stderr=True)
        self._progress = Progress(*self._columns(), console=self._console)
        self._last_line: float | None = None
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self._note = ""

    def __enter__(self) -> "Bars":
        """Start the display on a terminal."""
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the finished bars on screen."""
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; see `alphaquant.progress.Progress`."""
        now = time.monotonic()
        self._times.record(stage, done, total, now)
        label = Stage(stage).text
        if self._last_line is None:
            self._last_line = now
        if not self._console.is_terminal:
            self._print_line(stage, done, total, now)
            return
        if stage not in self._tasks:
            added = self._progress.add_task(label, total=total, note="", stage=stage)
            self._tasks[stage] = added
        note = self._note if stage == Stage.STUDY else ""
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)

    def note(self, line: str, short: str) -> None:
        """What the last trial found.

        Args:
            line: everything, on a line of its own where there is no terminal.
            short: beside the bar on a terminal, at most 21 characters.
        """
        self._note = short
        if not self._console.is_terminal:
            self._last_line = time.monotonic()
            say(line, sys.stderr)

    def tell(self, line: str) -> None:
        """A line on standard error, above the bars of a terminal."""
        if self._console.is_terminal:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            say(line, sys.stderr)

    def _columns(self) -> list[ProgressColumn]:
        """Columns that fit the terminal; with all of them and five spaces a line has 80."""
        width = self._console.width
        found: list[ProgressColumn] = [_LabelColumn()]
        if width >= _BAR_WIDTH:
            found.append(BarColumn(bar_width=8))
        found.append(MofNCompleteColumn(table_column=Column(no_wrap=True)))
        found += [_TimeColumn(self._elapsed_text), _TimeColumn(self._remaining_text)]
        if width >= _NOTE_WIDTH:
            found.append(TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)))
        return found

    def _print_line(self, stage: str, done: int, total: int, now: float) -> None:
        """A line at the end of a stage, and at a step after a silence."""
        counts = f"{Stage(stage).text}: {done} of {total}"
        if done >= total:
            if stage in self._ended:
                return
            self._ended.add(stage)
            parts = [counts, f"{self._times.seconds[stage]:.1f} s"]
        elif now - (self._last_line or 0.0) >= _SECONDS_BETWEEN_LINES:
            left = self._remaining_text(stage)
            parts = [counts, self._elapsed_text(stage), left and f"{left} in this stage"]
        else:
            return
        self._last_line = now
        say(", ".join(part for part in parts if part), sys.stderr)

    def _elapsed_text(self, stage: str) -> str:
        return duration_text(self._times.elapsed(stage, time.monotonic()))

    def _remaining_text(self, stage: str) -> str:
        seconds = self._times.remaining_with_others(stage, time.monotonic())
        if seconds is None or stage in _UNEVEN:
            return ""
        return f"{duration_text(seconds)} left"


class _LabelColumn(ProgressColumn):
    """The stage's name; the only column that is cut where counts are longer than usual."""

    def render(self, task: Task) -> Text:
        """The name, to the left, as wide as the longest."""
        return Text(f"{task.description:<20}", no_wrap=True, overflow="ellipsis")


class _TimeColumn(ProgressColumn):
    """A duration of the task's stage, read anew at every refresh."""

    def __init__(self, text_of: Callable[[str], str]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._text_of = text_of

    def render(self, task: Task) -> Text:
        """The duration, to the right."""
        return Text(self._text_of(task.fields["stage"]), justify="right", style="cyan")


def duration_text(seconds: float) -> str:
    """Seconds for people, at most 7 characters: `0:07`, `12:34`, `1:02:03`, `12 h`.

    Args:
        seconds: 0 or more; rounded down.
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 10:
        return f"{hours} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _CurrentStderr(logging.Handler):
    """Writes where `sys.stderr` points now: above the bars while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        say(self.format(record), sys.stderr)


def set_up(debug: bool) -> None:
    """Quiet libraries, our warnings to stderr; each command calls it before heavy imports."""
    # GPTQ's column loop is many small operations: threads that spin between them cost four times
    # the run time as soon as another process uses a core. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(message)s", handlers=[_CurrentStderr()]
    )
    logging.getLogger("alphaquant").setLevel(logging.DEBUG if debug else logging.WARNING)


class Preempted(KeyboardInterrupt):
    """SIGTERM: whoever runs the machine wants it back. What ends well on Ctrl-C ends well here."""


@contextmanager
def _preemptible() -> Iterator[None]:
    """Let SIGTERM end the main thread as Ctrl-C does, once: what is left must be put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set there only
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that was forked meanwhile ends as it would without us
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Preempted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def reported(debug: bool, interrupted: str, resumes: bool = False) -> Iterator[None]:
    """Turn what goes wrong into one line and exit code 1, Ctrl-C into 130.

    SIGTERM ends a command that goes on where it stopped with 0, because nothing is wrong.

    Our errors say what to do, those of disks what they hit; anything else is a bug of ours, and
    says so. A reader of stdout that goes away ends a command without a word.

    Args:
        debug: let tracebacks through.
        interrupted: what to tell the user after Ctrl-C.
        resumes: whether the same command goes on where it stopped.
    """
    try:
        with _preemptible() if resumes else nullcontext():
            yield
        sys.stdout.flush()
    except Preempted as stop:
        say("\nstopped by SIGTERM; the same command goes on from here", sys.stderr)
        raise SystemExit(0) from stop
    except KeyboardInterrupt as stop:
        say(f"\n{interrupted}", sys.stderr)
        raise SystemExit(INTERRUPTED) from stop
    except Exception as error:
        if debug or isinstance(error, CycloptsError):
            raise
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise SystemExit(1) from error
        raise _failed(_told(error, resumes)) from error


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more; if so, what is left to write goes nowhere."""
    try:
        print(flush=True)  # what could not be written is dropped, so a flush alone says nothing
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _told(error: Exception, resumes: bool) -> str:
    """An error in one line."""
    if isinstance(error, AlphaQuantError):
        return str(error)
    if isinstance(error, _disk_errors()):
        again = "mend this and run the same command again"
        return f"{_disk_text(error)}; {'nothing is lost: ' if resumes else ''}{again}"
    if isinstance(error, MemoryError):
        return "this machine has not enough memory; use a larger one, or fewer or shorter windows"
    first = next(iter(str(error).strip().splitlines()), "")
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"this is a bug of AlphaQuant: {said}; run again with --debug and report it"


def _disk_text(error: Exception) -> str:
    """What a disk could not do, with the file where it has one."""
    files = [getattr(error, name, None) for name in ("filename", "filename2")]
    named = " and ".join(str(name) for name in files if name is not None)
    reason = getattr(error, "strerror", None)
    return f"{named}: {reason}" if named and reason else str(error) or type(error).__name__


def quiet_libraries() -> None:
    """Quiet transformers, optuna and what transformers imports, once they are needed anyway."""
    import optuna

    # torchao, where it is installed, warns of kernels that this machine cannot run, and torch of
    # how torchao registers its types.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _failed(message: str) -> SystemExit:
    say(f"error: {' '.join(message.split())}", sys.stderr)
    return SystemExit(1)


def _disk_errors() -> tuple[type[Exception], ...]:
    """What a full disk or missing rights raise: OSError, or safetensors' own.

    Called when something was raised, so that `--help` imports nothing.
    """
    if "safetensors" not in sys.modules:
        return (OSError,)
    from safetensors import SafetensorError

    return (OSError, SafetensorError)

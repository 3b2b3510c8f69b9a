"""What all commands share: progress on stderr, errors in one line, exit codes 0, 1, 2 and 130."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, TracebackType

import typer
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
from rich.text import Text

from alphaquant.errors import AlphaQuantError

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "load": "load model and texts",
        "teacher": "original's outputs",
        "spectra": "spectra of weights",
        "hessians": "Hessians",
        "bank": "bank: every format",
        "costs": "costs of formats",
        "study": "study",
        "probe": "random assignments",
        "sweep": "sweep of blocks",
        "relinearize": "costs measured anew",
        "anchor": "costs at the best",
        "scores": "original's scores",
        "polish": "measured exchanges",
        "gate": "held-out comparison",
        "report": "report",
        "quantize": "quantize",
        "first_run": "run the checkpoint",
        "evaluate": "evaluate",
    }
)
"""What people read for each stage that reports progress, at most 20 characters."""

_MADE_OF_OTHERS = ("relinearize",)
"""Stages whose steps are other stages and trials: those have the seconds."""


class Bars:
    """One progress bar per stage on a terminal; elsewhere one line when a stage ends.

    A bar has the seconds that its stage took and an estimate of those that are left, see
    `alphaquant.studies.progress`.
    """

    def __init__(self) -> None:
        """Make the display; nothing is shown before the first call."""
        from alphaquant.studies.progress import StageTimes

        self._times = StageTimes()
        self._console = Console(stderr=True)
        # 20 + 8 + 7 + 7 + 12 + 21 characters and five spaces are 80.
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            _TimeColumn(self._elapsed_text),
            _TimeColumn(self._remaining_text),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
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
        """Show how far a stage is; see `alphaquant.quant.bank.Progress`."""
        self._times.record(stage, done, total, time.monotonic())
        label = STAGES.get(stage, stage)
        if not self._console.is_terminal:
            if done == total and stage not in self._ended:
                self._ended.add(stage)
                seconds = f", {self._times.seconds[stage]:.1f} s"
                took = "" if stage in _MADE_OF_OTHERS else seconds
                print(f"{label}: {done} of {total}{took}", file=sys.stderr)
            return
        if stage not in self._tasks:
            added = self._progress.add_task(label, total=total, note="", stage=stage)
            self._tasks[stage] = added
        note = self._note if stage == "study" else ""
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)

    def note(self, line: str, short: str) -> None:
        """What the last trial found.

        Args:
            line: everything, on a line of its own where there is no terminal.
            short: beside the bar on a terminal, at most 21 characters.
        """
        self._note = short
        if not self._console.is_terminal:
            print(line, file=sys.stderr)

    def _elapsed_text(self, stage: str) -> str:
        if stage in _MADE_OF_OTHERS:
            return ""
        return duration_text(self._times.elapsed(stage, time.monotonic()))

    def _remaining_text(self, stage: str) -> str:
        seconds = self._times.remaining(stage, time.monotonic())
        if seconds is None or stage in _MADE_OF_OTHERS:
            return ""
        return f"{duration_text(seconds)} left"


class _TimeColumn(ProgressColumn):
    """A duration of the task's stage, read anew at every refresh."""

    def __init__(self, text_of: Callable[[str], str]) -> None:
        super().__init__()
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
        print(self.format(record), file=sys.stderr)


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


@contextmanager
def reported(debug: bool, interrupted: str) -> Iterator[None]:
    """Turn our errors and those of disks into one line and exit code 1, Ctrl-C into 130.

    Anything else is a bug and keeps its traceback.

    Args:
        debug: let tracebacks through.
        interrupted: what to tell the user after Ctrl-C.
    """
    try:
        yield
    except AlphaQuantError as error:
        if debug:
            raise
        raise _failed(str(error)) from error
    except KeyboardInterrupt as stop:
        print(f"\n{interrupted}", file=sys.stderr)
        raise typer.Exit(130) from stop
    except _disk_errors() as error:
        if debug:
            raise
        raise _failed(f"{error}; nothing is lost: mend this and run the same command") from error


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


def application(command: Callable[..., None]) -> typer.Typer:
    """A single-command application."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    return app


def _failed(message: str) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(1)


def _disk_errors() -> tuple[type[Exception], ...]:
    """What a full disk or missing rights raise: OSError, or safetensors' own.

    Called when something was raised, so that `--help` imports nothing.
    """
    if "safetensors" not in sys.modules:
        return (OSError,)
    from safetensors import SafetensorError

    return (OSError, SafetensorError)

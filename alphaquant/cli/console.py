"""What all commands share: progress on stderr, errors in one line, exit codes 0, 1, 2 and 130."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from alphaquant.errors import AlphaQuantError

_STAGES = {
    "load": "load model and texts",
    "teacher": "predictions of the original",
    "hessians": "Hessians",
    "bank": "bank: every format",
    "costs": "costs",
    "study": "study",
    "gate": "held-out comparison",
    "report": "report",
    "quantize": "quantize",
    "evaluate": "evaluate",
}


class Bars:
    """One progress bar per stage on a terminal; elsewhere one line when a stage ends."""

    def __init__(self) -> None:
        """Make the display; nothing is shown before the first call."""
        self._console = Console(stderr=True)
        # 27 + 14 + 7 + 7 + 21 characters and four spaces are 80.
        self._progress = Progress(
            TextColumn("{task.description:<27}"),
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
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
        label = _STAGES.get(stage, stage)
        if not self._console.is_terminal:
            if done == total and stage not in self._ended:
                self._ended.add(stage)
                print(f"{label}: {done} of {total}", file=sys.stderr)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(label, total=total, note="")
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


def set_up(debug: bool) -> None:
    """Quiet libraries, our warnings to stderr; each command calls it before heavy imports."""
    # GPTQ's column loop is many small operations: threads that spin between them cost four times
    # the run time as soon as another process uses a core. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
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

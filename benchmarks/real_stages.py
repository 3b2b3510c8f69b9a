"""Programs of the package as stages of a benchmark: each in a process of its own, measured.

A stage that is done is kept in a folder with what it printed, under a digest of its command, so
that a benchmark that was stopped goes on. This process stays small, because Linux counts what a
parent held into the peak of its child: it must not import torch.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphaquant.files import whole_file

_MODULES = {
    "aq-search": "search",
    "aq-quantize": "quantize",
    "aq-eval": "evaluate",
}


@dataclass(frozen=True)
class Stage:
    """What a program took.

    Attributes:
        name: of the stage.
        command: as one would type it.
        seconds: wall time.
        cpu_seconds: processor time of all its threads and children.
        peak_memory_bytes: most that it held at a time.
        output: what it printed to stdout.
    """

    name: str
    command: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    output: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the result file, without the output."""
        return {k: v for k, v in asdict(self).items() if k != "output"}


class StageError(Exception):
    """A program did not finish."""


def run_program(name: str, words: Sequence[str], folder: Path) -> Stage:
    """Run a program of the package; see `run_stage`.

    Args:
        name: `aq-search`, ...
        words: its options.
        folder: for its output.

    Raises:
        StageError: it did not exit with 0.
    """
    start = f"from alphaquant.cli.{_MODULES[name]} import main; main()"
    return run_process(name, [sys.executable, "-c", start, *words], [name, *words], folder)


def run_process(name: str, process: Sequence[str], shown: Sequence[str], folder: Path) -> Stage:
    """Run a process and measure it.

    Args:
        name: of the stage.
        process: its words.
        shown: the command as a reader would type it.
        folder: for its output.

    Raises:
        StageError: it did not exit with 0; the message ends with its last words.
    """
    out, errors = folder / "stdout", folder / "stderr"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = time.perf_counter()
    with out.open("w") as stdout, errors.open("w") as stderr:
        child = subprocess.Popen(process, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        words = (errors.read_text().strip() or "no message").splitlines()
        raise StageError(f"{shlex.join(shown)}: exit {child.returncode}: {words[-1]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Stage(
        name,
        shlex.join(shown),
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * unit,
        out.read_text(),
    )


class Stages:
    """Stages in a folder, each run once."""

    def __init__(self, folder: Path, run: Any = run_program) -> None:
        """Keep records in a folder.

        Args:
            folder: made if it is not there.
            run: runs a program; another one in tests.
        """
        self._folder, self._run = folder, run
        self.done: list[Stage] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, words: Sequence[str]) -> Stage:
        """A program's stage, from the folder or run now.

        Raises:
            StageError: it did not exit with 0.
        """
        key = hashlib.sha256(json.dumps([name, *words]).encode()).hexdigest()[:24]
        record = self._folder / f"{key}.json"
        if record.is_file():
            stage = Stage(**json.loads(record.read_text()))
        else:
            stage = self._run(name, words, self._folder)
            with whole_file(record) as part:
                part.write_text(json.dumps(asdict(stage), indent=1))
        self.done.append(stage)
        return stage

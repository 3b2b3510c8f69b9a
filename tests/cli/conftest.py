"""Commands in this process and in others, on a tiny model."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from alphaquant.cli.application import start as start_program
from tests.programs import MODULES, ROOT, program


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def small(tiny: Path, texts: dict[str, Path], cache: Path) -> tuple[str, ...]:
    """Options of a small search; later ones win."""
    return (
        *("--model", str(tiny), "--budget", "5.2bits", "--formats", "int3-g32,int4-g32,int8-row"),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "8"),
        *("--evaluation", str(texts["search"]), "--evaluation-samples", "4"),
        *("--heldout", str(texts["heldout"]), "--heldout-samples", "4"),
        *("--seq-len", "32", "--trials", "5", "--cache", str(cache)),
    )


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: `run("aq-search", "--budget", "4bits")`."""

    def run_command(name: str, *options: str) -> Done:
        code = start_program(program(name), list(options))
        return Done(code, *capsys.readouterr())

    return run_command


@pytest.fixture
def start() -> Start:
    """Start a command in a process of its own; the test waits for it."""

    def start_command(name: str, *options: str) -> "subprocess.Popen[str]":
        code = f"from {MODULES[name]} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return start_command

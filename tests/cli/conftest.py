"""Commands in this process and in others, on a tiny model."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {name: target.partition(":")[0] for name, target in PROJECT["scripts"].items()}


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
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: `run("aq-search", "--budget", "4bits")`."""

    def run_command(name: str, *options: str) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *options])
        module = import_module(COMMANDS[name])
        with pytest.raises(SystemExit) as ended:
            module.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run_command


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a command in a process of its own; the test waits for it."""

    def start_command(name: str, *options: str) -> "subprocess.Popen[str]":
        code = f"from {COMMANDS[name]} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return start_command

"""Inputs that work, made once: a model, texts, a packed checkpoint, a finished search."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alphaquant.cli.application import start as start_program
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.testing.checkpoints import save_texts, save_tiny
from tests.corpus.engine import Place, contents
from tests.programs import MODULES, ROOT, program

Ended = tuple[int, str, str]
"""Exit code, stdout, stderr."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Inputs that work, by name; all cases together leave them as they are."""
    folder = tmp_path_factory.mktemp("shared")
    texts = save_texts(folder)
    made = {
        "tiny": save_tiny(folder / "tiny"),
        "dense": save_tiny(folder / "dense", "llama"),
        "int4": folder / "int4.json",
        "packed": folder / "packed",
        "found": folder / "found",
        "cache": folder / "cache",
        "calibration": texts["calibration"],
        "evaluation": texts["search"],
        "heldout": texts["heldout"],
    }
    made["int4"].write_text('{"default": {"wq": "int4", "group_size": 32}}')
    inputs = {"model": str(made["tiny"]), "config": made["int4"], "out": made["packed"]}
    quantize(QuantizeSpec.of(**inputs, method="rtn"))
    _search(made)
    before = contents(folder)
    yield made
    assert contents(folder) == before, "a case changed an input that others read"


def _search(made: dict[str, Path]) -> None:
    """The search of `engine.SEARCH`."""
    texts = {name: str(made[name]) for name in ("calibration", "evaluation", "heldout")}
    spec = SearchSpec.of(
        model=str(made["tiny"]),
        budget="5.2bits",
        formats="int3-g32,int4-g32,int8-row",
        mode="knobs",
        trials=2,
        calibration_samples=8,
        evaluation_samples=4,
        heldout_samples=4,
        seq_len=32,
        out=made["found"],
        cache=made["cache"],
        **texts,
    )
    search(spec)


@pytest.fixture
def place(shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A working directory of its own; a cache that is made would be seen there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALPHAQUANT_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, shared)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Ended]:
    """Run a command in this process."""

    def run_command(words: list[str]) -> Ended:
        code = start_program(program(words[0]), words[1:])
        return (code, *capsys.readouterr())

    return run_command


@pytest.fixture
def start() -> Callable[[list[str]], Ended]:
    """Run a command in a process of its own."""

    def start_command(words: list[str]) -> Ended:
        code = f"from {MODULES[words[0]]} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *words[1:]],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stdout, done.stderr

    return start_command

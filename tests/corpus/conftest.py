"""Inputs that work, made once: a model, texts, a packed checkpoint, a finished search."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from alphaquant.studies.spec import DataSpec, SearchSpec

from alphaquant.commands.quantize import QuantizeSpec, quantize
from alphaquant.commands.search import search
from alphaquant.testing.checkpoints import save_texts, save_tiny
from tests.corpus.engine import Place, contents

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {name: target.partition(":")[0] for name, target in PROJECT["scripts"].items()}

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
    quantize(QuantizeSpec(str(made["tiny"]), made["int4"], made["packed"], {"method": "rtn"}))
    _search(made)
    before = contents(folder)
    yield made
    assert contents(folder) == before, "a case changed an input that others read"


def _search(made: dict[str, Path]) -> None:
    """The search of `engine.SEARCH`."""
    texts = [str(made[name]) for name in ("calibration", "evaluation", "heldout")]
    data = DataSpec(*texts, n_calibration=8, n_evaluation=4, n_heldout=4, seq_len=32)
    spec = SearchSpec(
        model=str(made["tiny"]),
        budget="5.2bits",
        formats="int3-g32,int4-g32,int8-row",
        mode="knobs",
        trials=2,
        data=data,
        out=made["found"],
        cache=made["cache"],
    )
    search(spec)


@pytest.fixture
def place(shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A working directory of its own; a cache that is made would be seen there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALPHAQUANT_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, shared)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], Ended]:
    """Run a command in this process."""

    def run_command(words: list[str]) -> Ended:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            import_module(COMMANDS[words[0]]).main()
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, captured.out, captured.err)

    return run_command


@pytest.fixture
def start() -> Callable[[list[str]], Ended]:
    """Run a command in a process of its own."""

    def start_command(words: list[str]) -> Ended:
        code = f"from {COMMANDS[words[0]]} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *words[1:]],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stdout, done.stderr

    return start_command

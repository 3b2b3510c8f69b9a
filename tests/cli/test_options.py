"""`--help` of every command: light and complete; wrong options are in tests/corpus."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from alphaquant.cli.console import application

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = sorted(target.partition(":")[0] for target in PROJECT["scripts"].values())
HEAVY = ("torch", "optuna", "transformers", "numpy", "scipy", "pandas", "pydantic")


def options_of(name: str) -> list[Any]:
    app = application(import_module(name).command)
    return list(typer.main.get_command(app).params)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_every_option_and_imports_nothing_heavy(name: str) -> None:
    probe = (
        f"import sys; sys.argv = ['aq', '--help']\n"
        f"from {name} import main\n"
        f"try: main()\n"
        f"except SystemExit as end: print(end.code)\n"
        f"print('heavy:', [n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", probe],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.endswith("0\nheavy: []\n")
    assert done.stderr == ""
    for option in options_of(name):
        is_argument = isinstance(option, typer.core.TyperArgument)
        assert (option.metavar if is_argument else option.opts[0]) in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text_and_shows_its_default(name: str) -> None:
    for option in options_of(name):
        assert option.help, option.name
        assert option.help.endswith("."), option.name
        if option.default is None and not option.required:
            words = ("default", "needed", "none")
            assert any(word in option.help for word in words), option.name

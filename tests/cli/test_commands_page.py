"""The page of commands shows every command, and what those that need no weights print."""

import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import typer

from alphaquant.cli.console import application

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

# A block whose first line is a prompt: the command, and exactly what it prints.
SHOWN = re.findall(r"^```\n\$ (aq-.*)\n((?:(?!```).*\n)+)```$", PAGE, re.MULTILINE)
ALL = re.findall(r"^(?:\$ )?(aq-[a-z]+ .*)$", PAGE, re.MULTILINE)


def module_of(command: str) -> str:
    return SCRIPTS[shlex.split(command)[0]].partition(":")[0]


def test_commands_without_weights_are_shown_with_their_output() -> None:
    names = {shlex.split(command)[0] for command, _ in SHOWN}
    assert names == {"aq-quantize", "aq-inspect", "aq-compare"}


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_output_is_what_the_command_prints(
    command: str,
    output: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        import_module(module_of(command)).main()
    assert not ended.value.code
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("command", ALL)
def test_shown_command_is_taken_by_its_program(command: str) -> None:
    name, *options = shlex.split(command)
    app = application(import_module(module_of(command)).command)
    typer.main.get_command(app).make_context(name, options)


@pytest.mark.parametrize(
    "name", ["aq-search", "aq-quantize", "aq-eval", "aq-inspect", "aq-compare"]
)
def test_command_is_an_entry_point_with_a_section_of_the_page(name: str) -> None:
    assert name in SCRIPTS
    assert f"| `{name}` |" in PAGE
    assert f"\n## {name}\n" in PAGE

"""The page of commands shows every command, and what those that need no weights print."""

import re
import shlex
from typing import Any

import pytest

from tests.programs import MODULES, ROOT, parse

PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")

# A block whose first line is a prompt: the command, and exactly what it prints.
SHOWN = re.findall(r"^```\n\$ (aq-.*)\n((?:(?!```).*\n)+)```$", PAGE, re.MULTILINE)
ALL = re.findall(r"^(?:\$ )?(aq-[a-z]+ .*)$", PAGE, re.MULTILINE)


def test_commands_without_weights_are_shown_with_their_output() -> None:
    names = {shlex.split(command)[0] for command, _ in SHOWN}
    assert names == {"aq-quantize", "aq-inspect", "aq-compare"}


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_output_is_what_the_command_prints(
    command: str, output: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = run(*shlex.split(command))
    assert done.code == 0
    assert done.out == output


@pytest.mark.parametrize("command", ALL)
def test_shown_command_is_taken_by_its_program(command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    "name", ["aq-search", "aq-quantize", "aq-eval", "aq-inspect", "aq-compare"]
)
def test_command_is_an_entry_point_with_a_section_of_the_page(name: str) -> None:
    assert name in MODULES
    assert f"| `{name}` |" in PAGE
    assert f"\n## {name}\n" in PAGE

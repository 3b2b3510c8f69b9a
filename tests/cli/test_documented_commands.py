"""Every command that the documents show is one that its program takes."""

import re

import pytest
from cyclopts import UnknownOptionError

from tests.programs import MODULES, ROOT, parse

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.py")),
]
# A command with an option: in a code block, after a prompt or between backticks.
COMMAND = re.compile(rf"\b((?:{'|'.join(MODULES)})(?:[ \t]+|\\\n)-(?:\\\n|[^`\n])*)")


def commands_of(text: str) -> list[str]:
    """The commands in a text, continued lines joined, without what is piped or commented."""
    found = (match.replace("\\\n", " ") for match in COMMAND.findall(text))
    return [re.split(r"\s[#|>&]", command)[0].strip() for command in found]


SHOWN = sorted({c for path in DOCUMENTS for c in commands_of(path.read_text(encoding="utf-8"))})


def test_commands_are_found() -> None:
    assert len(SHOWN) >= 4
    text = "x `aq-eval --model a` y\n  aq-search --budget 4bits \\\n  --trials 3  # short\n"
    assert commands_of(text) == ["aq-eval --model a", "aq-search --budget 4bits    --trials 3"]


@pytest.mark.parametrize("command", SHOWN)
def test_shown_command_is_taken(command: str) -> None:
    is_mention = "[OPTIONS]" in command or len(command.split()) == 2  # an option's name alone
    if not is_mention:
        parse(command)


@pytest.mark.parametrize(
    "command",
    ["aq-search --budget 4bits --trails 3", "aq-quantize --model m --config c --nsample 4"],
)
def test_a_command_with_another_option_is_not(command: str) -> None:
    with pytest.raises(UnknownOptionError):
        parse(command)

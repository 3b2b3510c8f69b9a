"""`--help` of every command: light and complete; wrong options are in tests/corpus."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import pytest
from cyclopts.argument import Argument

from alphaquant.cli.application import application
from alphaquant.specs.check import kinds_of
from tests.programs import MODULES, ROOT, program

HEAVY = ("torch", "optuna", "transformers", "numpy", "scipy", "pandas", "pydantic")
WIDTHS = (80, 50)
LITERALS = ("demo, ", "auto, ", "gptq, ", "1 quantizes")
"""How a text begins whose first word is what people type."""


def options_of(name: str) -> Iterator[Argument]:
    """Everything that a program takes."""
    app = application(program(name))
    for part in (app, app.meta):
        yield from (a for a in part.assemble_argument_collection(parse_docstring=True) if a.show)


@pytest.mark.parametrize("name", MODULES)
def test_help_prints_every_option_and_imports_nothing_heavy(name: str) -> None:
    probe = (
        f"import sys; sys.argv = ['aq', '--help']\n"
        f"from {MODULES[name]} import main\n"
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
        assert option.name in done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_option_has_a_help_text_and_shows_its_default(name: str) -> None:
    for option in options_of(name):
        text = option.parameter.help
        assert text, option.name
        assert text.endswith("."), option.name
        assert text[0].isupper() or text.startswith(LITERALS), option.name
        if option.field_info.default is None and not option.required:
            assert any(word in text for word in ("efault", "needed", "none")), option.name


@pytest.mark.parametrize("name", MODULES)
def test_the_words_that_an_option_takes_stand_in_its_text(name: str) -> None:
    for option in options_of(name):
        for kind, _ in kinds_of(option.hint):
            words = get_args(kind) if get_origin(kind) is Literal else ()
            assert all(word in option.parameter.help for word in words), option.name


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MODULES)
def test_help_fits_a_terminal(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    application(program(name)).meta(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width

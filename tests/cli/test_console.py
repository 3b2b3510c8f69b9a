"""Progress and errors: stderr only, one line, the right exit code."""

import re
from collections.abc import Iterator

import pytest
import typer
from safetensors import SafetensorError

from alphaquant.cli.console import Bars, reported
from alphaquant.errors import BudgetError


@pytest.fixture
def bars() -> Iterator[Bars]:
    with Bars() as display:
        yield display


def fail(error: BaseException, *, debug: bool = False) -> typer.Exit:
    """Raise an error inside `reported` and return the exit that comes out."""
    with pytest.raises(typer.Exit) as ended, reported(debug, "stopped here"):
        raise error
    return ended.value


def test_our_error_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(BudgetError("too\n  small")).exit_code == 1
    assert capsys.readouterr() == ("", "error: too small\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/out/x"),
        PermissionError(13, "Permission denied", "/out/x"),
        SafetensorError("No space left on device: /out/x"),
    ],
)
def test_full_or_forbidden_disk_is_one_line_and_1(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error).exit_code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "/out/x" in err


def test_interrupt_is_told_what_to_do_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(KeyboardInterrupt()).exit_code == 130
    assert capsys.readouterr() == ("", "\nstopped here\n")


def test_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), reported(False, ""):
        raise ZeroDivisionError


@pytest.mark.parametrize("error", [BudgetError("small"), OSError("full")])
def test_debug_keeps_every_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), reported(True, ""):
        raise error


def test_stage_is_one_line_when_it_ends(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    for done in (0, 1, 2, 2):
        bars("bank", done, 2)
    bars("unnamed", 1, 1)
    assert capsys.readouterr() == ("", "bank: every format: 2 of 2\nunnamed: 1 of 1\n")


def test_note_is_a_line_of_its_own(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    bars.note("trial 3: all of it", "short")
    assert capsys.readouterr() == ("", "trial 3: all of it\n")


def test_terminal_of_80_columns_gets_one_whole_bar_per_stage_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    note = "0.123456 at 12.34 bits"[:21]
    with Bars() as display:
        for stage in ("teacher", "study"):
            display(stage, 0, 112)
        display.note("trial 7: all of it", note)
        display("study", 112, 112)
    out, err = capsys.readouterr()
    assert out == ""
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).splitlines()[-2:]
    assert last[0].startswith("predictions of the original ")
    assert last[1].startswith("study ")
    assert "112/112" in last[1]
    assert last[1].rstrip().endswith(note)
    assert all(len(line.rstrip()) <= 80 for line in last)
    assert "all of it" not in err

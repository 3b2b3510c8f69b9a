"""Progress and errors: stderr only, one line, the right exit code."""

import ast
import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from safetensors import SafetensorError

from alphaquant.cli import console
from alphaquant.cli.console import STAGES, Bars, duration_text, reported, set_up
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
    out, err = capsys.readouterr()
    assert out == ""
    assert re.sub(r"[0-9.]+ s", "T s", err) == (
        "bank: every format: 2 of 2, T s\nunnamed: 1 of 1, T s\n"
    )


def test_line_of_a_stage_has_the_seconds_that_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 12.34, 20.0, 20.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with Bars() as display:
        display("costs", 0, 4)
        display("costs", 4, 4)
        display("relinearize", 0, 2)
        display("relinearize", 2, 2)
    assert capsys.readouterr().err == "costs of formats: 4 of 4, 12.3 s\n" + (
        "costs measured anew: 2 of 2\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (7.9, "0:07"),
        (754.0, "12:34"),
        (3723.0, "1:02:03"),
        (35999.0, "9:59:59"),
        (36000.0, "10 h"),
        (3.6e6, "1000 h"),
    ],
)
def test_duration_is_at_most_seven_characters(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
    assert len(text) <= 7


def calls_of_progress(source: str) -> set[str]:
    """Stages that a source reports: the first of three arguments of `progress` or `clock`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and len(node.args) == 3:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            stage = getattr(node.args[0], "value", None)
            if name in ("progress", "clock") and isinstance(stage, str):
                found.add(stage)
    return found


def test_every_stage_has_a_label_and_every_label_a_stage() -> None:
    package = Path(console.__file__).parents[1]
    stages = set().union(*(calls_of_progress(p.read_text()) for p in package.rglob("*.py")))
    assert stages == set(STAGES)


def test_calls_of_progress_are_found() -> None:
    source = "run.clock('a', 0, 1)\nself.progress('b', x, n)\nprogress(done, 2, 3)\nf('c', 0, 1)"
    assert calls_of_progress(source) == {"a", "b"}


def test_labels_fit_their_column() -> None:
    assert max(map(len, STAGES.values())) <= 20


def test_warning_goes_where_stderr_points_when_it_is_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, added = logging.getLogger(), []
    monkeypatch.setattr(root, "handlers", added)
    set_up(debug=False)
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    logging.getLogger("alphaquant.somewhere").warning("mind %s", "this")
    assert other.getvalue() == "WARNING mind this\n"
    assert capsys.readouterr().err == ""


def test_note_is_a_line_of_its_own(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    bars.note("trial 3: all of it", "short")
    assert capsys.readouterr() == ("", "trial 3: all of it\n")


def test_terminal_of_80_columns_gets_one_whole_bar_per_stage_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    note = "0.123456 at 12.34 bits"[:21]
    with Bars() as display:
        display("teacher", 0, 112)
        now[0] = 4000.0
        display("teacher", 112, 112)
        display.note("trial 7: all of it", note)
        now[0] = 44000.0
        display("study", 100, 112)
    out, err = capsys.readouterr()
    assert out == ""
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).splitlines()[-2:]
    assert last[0].startswith("original's outputs ")
    assert "1:06:40" in last[0]
    assert "left" not in last[0]
    assert last[1].startswith("study ")
    assert "100/112    11 h 1:20:00 left 0.123456" in last[1]
    assert last[1].rstrip().endswith(note)
    assert all(len(line.rstrip()) <= 80 for line in last)
    assert "all of it" not in err

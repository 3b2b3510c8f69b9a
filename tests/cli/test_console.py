"""Progress and errors: stderr only, one line, the right exit code."""

import ast
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from alphaquant.cli import console
from alphaquant.cli.application import version_text
from alphaquant.cli.console import Bars, duration_text, reported, set_up
from alphaquant.cli.screen import printable
from alphaquant.errors import BudgetError
from alphaquant.progress import Stage


@pytest.fixture
def bars() -> Iterator[Bars]:
    with Bars() as display:
        yield display


def fail(error: BaseException, *, debug: bool = False) -> SystemExit:
    """Raise an error inside `reported` and return the exit that comes out."""
    with pytest.raises(SystemExit) as ended, reported(debug, "stopped here"):
        raise error
    return ended.value


def test_our_error_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(BudgetError("too\n  small")).code == 1
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
    assert fail(error).code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "/out/x" in err


def test_interrupt_is_told_what_to_do_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(KeyboardInterrupt()).code == 130
    assert capsys.readouterr() == ("", "\nstopped here\n")


def test_only_what_resumes_says_that_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(28, "No space left on device", "/out/x")
    assert fail(error).code == 1
    mend = "mend this and run the same command again\n"
    assert capsys.readouterr().err == f"error: /out/x: No space left on device; {mend}"
    with pytest.raises(SystemExit), reported(False, "", resumes=True):
        raise error
    shown = capsys.readouterr().err
    assert shown == f"error: /out/x: No space left on device; nothing is lost: {mend}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("division by zero\nmore"), "ZeroDivisionError: division by zero;"),
        (RecursionError("too deep"), "RecursionError: too deep;"),
        (AssertionError(), "AssertionError;"),
    ],
)
def test_bug_is_one_line_that_asks_for_a_report(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error).code == 1
    expected = f"this is a bug of AlphaQuant: {said} run again with --debug and report it"
    assert capsys.readouterr() == ("", f"error: {expected}\n")


def test_too_little_memory_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(MemoryError()).code == 1
    assert "not enough memory" in capsys.readouterr().err


def test_reader_of_stdout_that_goes_away_is_no_error() -> None:
    code = (
        "import time\nfrom alphaquant.cli.console import reported\n"
        "with reported(False, ''):\n    print('first', flush=True)\n    time.sleep(0.5)\n"
        "    for _ in range(9999):\n        print('x' * 99)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_control_characters_of_others_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[31m\r\x07\x9b\u202e\tb\nc") == (
        "a\\x1b[31m\\x0d\\x07\\x9b\\u202e\tb\nc"
    ).replace("\\x0d", "\\r")
    fail(BudgetError("model \x1b]0;title\x07"))
    assert capsys.readouterr().err == "error: model \\x1b]0;title\\x07\n"


def test_version_is_that_of_the_package_and_of_what_it_rests_on() -> None:
    assert re.fullmatch(
        r"aq-search \d+\.\d+\.\d+ \(torch \d+\.\d+\S*, transformers \d+\.\d+\S*\)", version_text()
    )


@pytest.mark.parametrize("error", [BudgetError("small"), OSError("full"), KeyError("x")])
def test_debug_keeps_every_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), reported(True, ""):
        raise error


def test_stage_is_one_line_when_it_ends(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    for done in (0, 1, 2, 2):
        bars("bank", done, 2)
    bars("load", 1, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.sub(r"[0-9.]+ s", "T s", err) == (
        "bank of formats: 2 of 2, T s\nload model and texts: 1 of 1, T s\n"
    )


def test_line_of_a_stage_has_the_seconds_that_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 12.34])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with Bars() as display:
        display("costs", 0, 4)
        display("costs", 4, 4)
    assert capsys.readouterr().err == "costs of formats: 4 of 4, 12.3 s\n"


def test_long_stage_is_a_line_at_the_first_step_after_half_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Bars() as display:
        for done in range(9):
            now[0] = 12.0 * done
            display("gate", done, 8)
    assert capsys.readouterr().err.splitlines() == [
        "held-out comparison: 3 of 8, 0:36, 1:00 left in this stage",
        "held-out comparison: 6 of 8, 1:12, 0:24 left in this stage",
        "held-out comparison: 8 of 8, 96.0 s",
    ]
    with Bars() as display:
        for done in range(3):
            now[0] += 40.0
            display("load", done, 6)
    said = capsys.readouterr().err
    assert "load model and texts: 1 of 6, 0:40\n" in said  # steps that differ foretell nothing


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


def stages_reported(source: str) -> set[str]:
    """Stages that a source reports: first of three arguments of `progress`, `clock`, or named."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and len(node.args) == 3:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            stage = getattr(node.args[0], "value", None)
            if name in ("progress", "clock") and isinstance(stage, str):
                found.add(str(Stage(stage)))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "Stage":
            found.add(str(getattr(Stage, node.attr)))
    return found


def test_every_stage_is_reported_by_a_command_and_no_other_is() -> None:
    package = Path(console.__file__).parents[1]
    rooms = [p for p in package.rglob("*.py") if p.parent not in (package, package / "cli")]
    assert set().union(*(stages_reported(p.read_text()) for p in rooms)) == set(Stage)


def test_stages_reported_are_found() -> None:
    source = "self.progress('gate', x, n)\nclock(Stage.LOAD, 0, 1)\nprogress(done, 2, 3)"
    assert stages_reported(source) == {"load", "gate"}
    with pytest.raises(ValueError, match="nap"):
        stages_reported("clock('nap', 0, 1)")


def test_every_stage_has_a_text_of_its_own_that_fits_its_column() -> None:
    texts = [stage.text for stage in Stage]
    assert len(set(texts)) == len(texts)
    assert all(0 < len(text) <= 20 for text in texts)


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


@pytest.mark.parametrize("width", [50, 58, 79])
def test_counts_and_times_are_whole_on_narrow_terminals(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", str(width))):
        monkeypatch.setenv(name, value)
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Bars() as display:
        display("costs", 0, 2)
        display("study", 0, 112)
        now[0] = 4000.0
        display("study", 50, 112)
        display("gate", 1000, 1200)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()[-3:]
    assert all(len(line.rstrip()) <= width for line in lines)
    assert [line.split()[0] for line in lines] == ["costs", "study", "held-out"]
    assert " 50/112 " in lines[1] and "1:06:40" in lines[1]
    assert "1000/1200" in lines[2]


def test_sigterm_ends_what_goes_on_with_0_and_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    undone: list[str] = []
    with pytest.raises(SystemExit) as ended, reported(False, "stopped here", resumes=True):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not disturb what is put away
            undone.append("put away")
    assert ended.value.code == 0
    assert undone == ["put away"]
    assert capsys.readouterr() == (
        "",
        "\nstopped by SIGTERM; the same command goes on from here\n",
    )
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_of_a_command_that_starts_anew_is_the_systems(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with reported(False, "stopped here"):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_child_dies_of_sigterm_as_ever() -> None:
    with reported(False, "stopped here", resumes=True):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM

"""How a case of the corpus is made, run and judged.

A case is one bad input and a part of the one line that it ends in, or one odd input that is right
and a part of its result. The tables are in the files beside this one, by subject.
"""

import hashlib
import shlex
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphaquant.errors import AlphaQuantError

LONGEST_LINE = 800
"""Characters of a message; what is longer is not read."""

QUANTIZE = "aq-quantize --model {tiny} --config {int4} --out out --method rtn"
DRY_RUN = "aq-quantize --model {tiny} --config c.json --dry-run"
SEARCH = (
    "aq-search --model {tiny} --budget 5.2bits --formats int3-g32,int4-g32,int8-row --trials 2 "
    "--calibration {calibration} --calibration-samples 8 --evaluation {evaluation} "
    "--evaluation-samples 4 --heldout {heldout} --heldout-samples 4 --seq-len 32 --mode knobs "
    "--out out"
)
EVALUATE = "aq-eval --model {tiny} --data {heldout} --samples 2 --seq-len 16"
SENSITIVITY = (
    "aq-sensitivity --model {tiny} --format int3-g32 --calibration {calibration} "
    "--calibration-samples 4 --seq-len 32 --method rtn --out out.json"
)
"""Commands that are right; what a case adds at the end is what is wrong with it."""


@dataclass(frozen=True)
class Place:
    """Where a case finds its inputs.

    Attributes:
        here: its own directory, which is the working directory too.
        shared: inputs that work, by name; nothing in them may change.
    """

    here: Path
    shared: Mapping[str, Path]

    def __getattr__(self, name: str) -> Path:
        if name not in self.shared:
            raise AttributeError(name)
        return self.shared[name]


Make = Callable[[Place], Any]


@dataclass(frozen=True)
class Case:
    """A command and how it ends.

    Attributes:
        name: what is odd about the input.
        command: as typed, with shared inputs in braces: `aq-eval --model {tiny}`.
        says: a part of the error's line; where the exit code is 0, of the output.
        code: the exit code: 1 our error, 2 a usage error, 0 the right result.
        files: made in the case's directory, by name.
        make: makes other inputs.
        own_process: run in a process of its own.
        resumes: what was finished stays in the output, and the same command goes on with it.
    """

    name: str
    command: str
    says: str
    code: int = 1
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Make | None = None
    own_process: bool = False
    resumes: bool = False

    def words(self, place: Place) -> list[str]:
        """The command's words."""
        names = {name: str(path) for name, path in place.shared.items()}
        return [word.format(**names) for word in shlex.split(self.command)]


@dataclass(frozen=True)
class Call:
    """A call of the Python API and how it ends.

    Attributes:
        name: what is odd about it.
        call: makes the call.
        says: a part of the message; None where the call is right.
        gives: what a right call returns.
        files: as in `Case`.
        make: as in `Case`.
        error: kind of the error.
    """

    name: str
    call: Callable[[Place], Any]
    says: str | None
    gives: Any = None
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Make | None = None
    error: type[Exception] = AlphaQuantError


def prepare(case: Case | Call, place: Place) -> None:
    """Make the inputs of a case."""
    for name, content in case.files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (place.here / name).write_bytes(data)
    if case.make is not None:
        case.make(place)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below one, with its sha256.

    Apart from copies of weights: whoever loads a model leaves one in the cache, for the next.
    """
    copies = folder / "cache" / "weights"
    found = {}
    for path in sorted(folder.rglob("*")):
        is_copy = copies in (path, *path.parents)
        if is_copy or (path == copies.parent and list(path.iterdir()) == [copies]):
            continue
        is_file = path.is_file() and not path.is_symlink()
        content = path.read_bytes() if is_file else b""
        if content.startswith(b"SQLite format 3"):
            content = rows_of(path)
        digest = hashlib.sha256(content).hexdigest() if is_file else "no file"
        found[str(path.relative_to(folder))] = digest
    return found


def rows_of(path: Path) -> bytes:
    """What is in a database, apart from claims: whoever opens a study makes one for a while."""
    try:
        with closing(sqlite3.connect(path)) as opened:
            lines = [x for x in opened.iterdump() if "alphaquant:claim" not in x]
    except sqlite3.DatabaseError:  # a case damaged it
        return path.read_bytes()
    return "\n".join(lines).encode()


def check_line(line: str, says: str) -> None:
    """A message that people can read, and that says what it should."""
    assert says in line, f"{says!r} is not in {line!r}"
    assert len(line) <= LONGEST_LINE
    assert "\n" not in line
    assert line.isprintable()
    assert "this is a bug of AlphaQuant" not in line


def check_done(case: Case, code: int, out: str, err: str) -> None:
    """How a command ended: the exit code, and one line or the right result."""
    assert "Traceback" not in out + err
    assert code == case.code, err or out
    if code == 0:
        assert case.says in out, f"{case.says!r} is not in {out!r}"
        assert "error" not in err.lower()
        return
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == ""
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0], err
    check_line(errors[0], case.says)
    see = f"; see {case.command.split()[0]} --help"
    assert errors[0].endswith(see) == (code == 2)
    assert code == 1 or err == f"{errors[0]}\n", "an option is wrong before anything is done"

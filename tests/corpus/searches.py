"""Folders of searches, studies and banks: damaged, of another search, or of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus.engine import SEARCH, Case, Make

AGAIN = f"{SEARCH} --cache {{cache}}"
"""The command of the shared search, on a copy of its folder."""


def _copied(change: Callable[[Path], object]) -> Make:
    """A copy of the search's folder, with one change, in `out`."""

    def make(place: Any) -> None:
        change(Path(shutil.copytree(place.found, place.here / "out")))

    return make


def _with_bank(change: Callable[[Path], object]) -> Make:
    """A copy of the cache, with one change, in `bank`; the folder is new."""

    def make(place: Any) -> None:
        change(Path(shutil.copytree(place.cache, place.here / "bank")))

    return make


def _run_json(**fields: Any) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        content = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**content, **fields}))

    return change


def _replaced(pattern: str, content: bytes) -> Callable[[Path], object]:
    """The first file of a pattern, replaced."""
    return lambda folder: min(folder.rglob(pattern)).write_bytes(content)


def _nothing(out: Path) -> None:
    pass


STUDIES = (
    Case("other settings", f"{AGAIN} --budget 6bits", "(budget)", make=_copied(_nothing)),
    Case("other seed", f"{AGAIN} --seed 5", "(seed)", make=_copied(_nothing)),
    Case(
        "folder of a later version",
        AGAIN,
        "version 99",
        make=_copied(_run_json(version=99)),
    ),
    Case("run.json of nothing", AGAIN, "run.json", make=_copied(_replaced("run.json", b""))),
    Case(
        "run.json of a list",
        AGAIN,
        "no search of ours",
        make=_copied(_replaced("run.json", b"[]")),
    ),
    Case(
        "study that is no database",
        AGAIN,
        "study.db",
        make=_copied(_replaced("study.db", b"this is no database" * 99)),
    ),
    Case(
        "study that is a folder",
        AGAIN,
        "study.db",
        make=_copied(lambda out: ((out / "study.db").unlink(), (out / "study.db").mkdir())),
    ),
    Case(
        "assignment cut short",
        AGAIN,
        "cannot be read",
        make=_copied(_replaced("assignments/*.json", b'{"model')),
    ),
)

BANKS = (
    Case(
        "bank that is damaged",
        f"{SEARCH} --cache bank",
        "damaged",
        make=_with_bank(_replaced("int4-g32/layer-000.safetensors", b"\0" * 99)),
        resumes=True,
    ),
)

READ = (
    Case("inspect a folder without a search", "aq-inspect . --model {tiny}", "best.json"),
    Case(
        "inspect a search cut short",
        "aq-inspect out",
        "best.json",
        make=_copied(_replaced("best.json", b'{"default')),
    ),
    Case(
        "compare a search with nothing left",
        "aq-compare out {int4}",
        "best.json",
        make=_copied(lambda out: (out / "best.json").unlink()),
    ),
    Case(
        "quantize a whole folder", "aq-quantize --model {tiny} --config {found} --out q", "found"
    ),
)

RIGHT = (
    Case("the same search again", AGAIN, "front of", 0, make=_copied(_nothing), resumes=True),
)

CASES = (*STUDIES, *BANKS, *READ, *RIGHT)

"""The hook that waits for another package's module, on modules made for the test."""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from alphaquant import import_hook
from alphaquant.import_hook import after_import

RECORD = """
calls = []
def record():
    import {waited}
    calls.append({waited}.VALUE)
"""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A module to wait for and `module:function` of a recording one; neither is imported yet."""
    waited, ours = "aq_waited_for", "aq_recorder"
    (tmp_path / f"{waited}.py").write_text("VALUE = 7\n")
    (tmp_path / f"{ours}.py").write_text(RECORD.format(waited=waited))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield waited, f"{ours}:record"
    for name in (waited, ours):
        sys.modules.pop(name, None)


def calls() -> list[int]:
    recorder = sys.modules.get("aq_recorder")
    return [] if recorder is None else list(recorder.calls)


def test_the_call_waits_for_the_module_and_finds_it_executed(names: tuple[str, str]) -> None:
    after_import(*names)
    assert "aq_recorder" not in sys.modules
    importlib.import_module(names[0])
    assert calls() == [7]
    importlib.import_module(names[0])
    assert calls() == [7]


def test_the_call_is_made_at_once_for_an_imported_module(names: tuple[str, str]) -> None:
    importlib.import_module(names[0])
    after_import(*names)
    assert calls() == [7]


def test_asking_twice_is_asking_once(names: tuple[str, str]) -> None:
    before = len(sys.meta_path)
    after_import(*names)
    after_import(*names)
    assert len(sys.meta_path) == before + 1
    importlib.import_module(names[0])
    assert calls() == [7]


def test_a_module_that_is_executed_again_is_followed_by_the_call_again(
    names: tuple[str, str],
) -> None:
    after_import(*names)
    importlib.reload(importlib.import_module(names[0]))
    assert calls() == [7, 7]


def test_the_module_looks_as_without_the_hook(names: tuple[str, str]) -> None:
    after_import(*names)
    module = importlib.import_module(names[0])
    assert type(module.__loader__) is SourceFileLoader
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__


def test_looking_for_the_module_calls_nothing_and_gives_its_source(
    names: tuple[str, str],
) -> None:
    after_import(*names)
    spec = importlib.util.find_spec(names[0])
    assert spec is not None and spec.loader is not None
    assert spec.loader.get_source(names[0]) == "VALUE = 7\n"  # type: ignore[attr-defined]
    assert names[0] not in sys.modules and calls() == []


def test_a_module_that_is_not_there_is_missing_as_ever(names: tuple[str, str]) -> None:
    after_import("aq_not_there", names[1])
    with pytest.raises(ModuleNotFoundError, match="No module named 'aq_not_there'"):
        importlib.import_module("aq_not_there")
    assert importlib.util.find_spec("aq_not_there") is None and calls() == []


def test_a_module_that_fails_is_not_followed_by_the_call(
    names: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / f"{names[0]}.py").write_text("raise RuntimeError('broken')\n")
    after_import(*names)
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(names[0])
    assert calls() == []


def test_a_package_that_was_imported_anew_adds_a_hook_that_does_not_fight_the_old_one(
    names: tuple[str, str],
) -> None:
    after_import(*names)
    spec = importlib.util.find_spec("alphaquant.import_hook")
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    sys.modules["aq_other_hook"] = other
    try:
        spec.loader.exec_module(other)
        assert other._Finder is not import_hook._Finder
        other.after_import(*names)
        importlib.import_module(names[0])
    finally:
        del sys.modules["aq_other_hook"]
    assert calls() == [7, 7]


def test_a_hook_that_asks_all_finders_is_not_asked_for_ever(names: tuple[str, str]) -> None:
    class AsksEverybody(importlib.abc.MetaPathFinder):
        busy = False

        def find_spec(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
            if self.busy or fullname != names[0]:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.busy = False

    sys.meta_path.insert(0, AsksEverybody())
    after_import(*names)
    sys.meta_path.insert(0, AsksEverybody())
    importlib.import_module(names[0])
    assert set(calls()) == {7}

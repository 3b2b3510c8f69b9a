"""`aq-cache`: what is there by kind, what is damaged, and what may go."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from alphaquant.cli.application import start
from alphaquant.cli.cache import CACHE, Kind
from alphaquant.commands import cache as module
from alphaquant.commands.cache import (
    KINDS,
    Entry,
    age_seconds,
    list_cache,
    prune_cache,
    size_text,
    verify_cache,
)
from alphaquant.errors import ConfigError, StoreError
from alphaquant.files import in_use, locked
from alphaquant.quant.bank import LOCK_FILE
from alphaquant.studies.inputs import USERS
from alphaquant.studies.result import SearchResult


@pytest.fixture(scope="session")
def filled(found: SearchResult, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cache of a search, with spectra and a GGUF file beside it, a day old."""
    root = tmp_path_factory.mktemp("filled") / "cache"
    shutil.copytree(cache, root)
    costs = next((root / "banks").glob("*/costs/*/layer-*.safetensors"))
    (root / "spectra").mkdir(exist_ok=True)
    shutil.copy(costs, root / "spectra" / "ab.safetensors")
    decoded = root / "gguf" / "ab" / "transformers-5"
    decoded.mkdir(parents=True, exist_ok=True)
    (decoded / "gguf.json").write_text('{"file": "model.gguf"}')
    for name in (
        "states/ab/batch.safetensors",
        "recipes/ab/bank/bank.json",
        "rotated/ab/rotation.json",
        "written/ab.safetensors",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "outputs" / "ab").mkdir(parents=True, exist_ok=True)
    shutil.copy(costs, root / "outputs" / "ab" / "layer-000.safetensors")
    age(root, 86400)
    return root


@pytest.fixture
def root(filled: Path, tmp_path: Path) -> Path:
    """A cache that a test may change."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in (path, *path.rglob("*")):
        os.utime(file, (then, then))


def kinds(entries: list[Entry] | tuple[Entry, ...]) -> set[str]:
    return {entry.kind for entry in entries}


def test_every_kind_is_listed_with_its_bytes_and_its_model(
    filled: Path, found: SearchResult
) -> None:
    entries = list_cache(filled)
    assert kinds(entries) == set(KINDS)
    files = [f for f in filled.rglob("*") if f.is_file()]
    apart = sum(f.stat().st_size for f in files if f.parent.name == "read")
    assert sum(e.n_bytes for e in entries) == sum(f.stat().st_size for f in files) - apart
    models = {e.kind: e.model for e in entries}
    name = found.provenance.model
    assert [models[kind] for kind in ("banks", "costs", "teachers")] == [name] * 3
    assert models["gguf"] == "model.gguf"
    assert all(abs(time.time() - 86400 - e.used) < 600 for e in entries)


def test_a_cache_that_a_search_left_is_whole(filled: Path) -> None:
    checked = list(verify_cache(list_cache(filled)))
    assert [c.damaged for c in checked] == [()] * len(checked)
    n_files = {c.entry.kind: c.n_files for c in checked}
    unsummed = {"gguf", "states", "recipes", "rotated", "written"}  # nothing to compare with
    assert {kind for kind, n in n_files.items() if n == 0} == unsummed


@pytest.mark.parametrize("kind", ["weights", "teachers", "banks", "costs", "spectra"])
def test_a_changed_byte_is_found(
    kind: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = next(e for e in list_cache(root) if e.kind == kind)
    inside = entry.path.rglob("*.safetensors") if entry.path.is_dir() else [entry.path]
    file = sorted(f for f in inside if "costs" not in f.parts or kind == "costs")[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert start(CACHE, ["verify", "--cache", str(root), "--kind", kind]) == 1
    out, err = capsys.readouterr()
    assert f"1 damaged\n  {file}" in out
    assert err.startswith("error: 1 files of the cache are damaged, the first is ")


def test_what_was_not_used_for_long_goes_and_what_was_stays(root: Path) -> None:
    entries = list_cache(root)
    teacher = next(e for e in entries if e.kind == "teachers")
    os.utime(teacher.path)
    entries = list_cache(root)
    assert prune_cache(root, entries, older_than="2d").removed == ()
    would = prune_cache(root, entries, older_than="12h", dry_run=True)
    assert len(list_cache(root)) == len(entries)
    done = prune_cache(root, entries, older_than="12h")
    assert [e.path for e in done.removed] == [e.path for e in would.removed]
    assert [e.path for e in list_cache(root)] == [teacher.path]
    assert not [p for p in root.rglob("*") if p.name.endswith(".pruned")]


def test_what_was_not_used_for_longest_goes_until_the_rest_is_small_enough(root: Path) -> None:
    entries = list_cache(root)
    oldest = next(e for e in entries if e.kind == "banks")
    age(oldest.path, 2 * 86400)
    entries = list_cache(root)
    total = sum(e.n_bytes for e in entries)
    found = prune_cache(root, entries, keep=f"{total - 1}bytes")
    assert len(found.removed) == 1
    assert found.removed[0].path.is_relative_to(oldest.path)
    assert prune_cache(root, list_cache(root), keep=f"{total}bytes").removed == ()


def test_what_a_process_writes_or_may_have_used_stays(root: Path) -> None:
    entries = list_cache(root)
    bank = next(e for e in entries if e.kind == "banks")
    with locked(bank.path / LOCK_FILE, "it"):
        found = prune_cache(root, entries, older_than="1h")
    assert kinds(found.in_use) == {"banks", "costs"}
    assert bank.path.is_dir()
    with in_use(root / USERS, "the cache"):
        os.utime(bank.path)  # as opening it does
        later = [replace(e, used=0.0) for e in list_cache(root)]  # it was listed before
        assert kinds(prune_cache(root, later, older_than="1h").in_use) == {"banks"}
    assert list_cache(root)[0].path == bank.path
    assert not (root / USERS).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("prune",), "would remove all of the cache"),
        (("prune", "--older-than", "soon"), "give hours, days or weeks"),
        (("prune", "--keep", "much"), "size to keep 'much'"),
        (("list", "--cache", "/nowhere"), "there is no cache in /nowhere"),
    ],
)
def test_wrong_options_are_one_line(
    options: tuple[str, ...], words: str, filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(CACHE, [options[0], "--cache", str(filled), *options[1:]]) == 1
    _, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1


def test_every_kind_can_be_asked_for() -> None:
    assert set(get_args(Kind)) == set(KINDS)


def test_the_list_is_a_table_or_json(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(CACHE, ["--cache", str(filled)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "size", "last", "used", "model", "where"]
    assert lines[-1].startswith("all: ")
    assert start(CACHE, ["--cache", str(filled), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(list_cache(filled))
    options = ["prune", "--cache", str(filled), "--kind", "costs", "--dry-run"]
    assert start(CACHE, options) == 0
    assert "would free" in capsys.readouterr().out


def test_an_entry_that_cannot_be_removed_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match="cannot remove .*Permission denied.*another --cache"):
        prune_cache(root, [e for e in list_cache(root) if e.kind == "banks"], older_than="1h")


def test_sizes_and_ages_in_words() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 30)] == [
        *("0 bytes", "1023 bytes", "1.5 KiB", "3.0 GiB")
    ]
    assert age_seconds("1.5d") == 129600
    with pytest.raises(ConfigError, match="--older-than is '3x'"):
        age_seconds("3x")

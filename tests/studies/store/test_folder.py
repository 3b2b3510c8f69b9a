"""Whose directory it is; nothing of others is touched, nothing is half-written."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta

from alphaquant.errors import StoreError
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.store.folder import (
    RUN_VERSION,
    RunFolder,
    check_folder,
    claim_folder,
    facts_digest,
    storage_of,
)

FACTS: dict[str, Any] = {"budget": "4bits", "seed": 0, "model_digest": "ab"}


@pytest.mark.parametrize("made", ["absent", "empty", "killed while claiming"])
def test_free_directory_is_claimed(made: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    if made != "absent":
        path.mkdir(parents=True)
    if made == "killed while claiming":
        (path / f"run.{'0a' * 16}.part").write_text("{")
    folder = claim_folder(path, FACTS, overwrite=False)
    run = json.loads((path / "run.json").read_text())
    assert folder.path == path
    assert run["facts"] == FACTS


def test_same_facts_take_the_directory_up_again_with_its_files(tmp_path: Path) -> None:
    claim_folder(tmp_path, FACTS, overwrite=False).write_text("best.json", "x")
    for overwrite in (False, True):
        claim_folder(tmp_path, FACTS, overwrite=overwrite)
        assert (tmp_path / "best.json").read_text() == "x"


def test_other_facts_are_refused_by_name(tmp_path: Path) -> None:
    claim_folder(tmp_path, FACTS, overwrite=False)
    other = {**FACTS, "seed": 1, "budget": "5bits"}
    with pytest.raises(StoreError, match=r"other settings \(budget, seed\)"):
        claim_folder(tmp_path, other, overwrite=False)
    assert json.loads((tmp_path / "run.json").read_text())["facts"] == FACTS


def test_other_version_of_the_files_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, FACTS, overwrite=False)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "version": 0}))
    with pytest.raises(StoreError, match=f"version 0 of this program's files, now {RUN_VERSION}"):
        check_folder(tmp_path, FACTS, overwrite=False)


def test_early_check_compares_what_it_is_given_and_writes_nothing(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", FACTS, overwrite=False)
    check_folder(tmp_path / "out", {"seed": 0}, overwrite=False)
    with pytest.raises(StoreError):
        check_folder(tmp_path / "out", {"seed": 1}, overwrite=False)
    check_folder(tmp_path / "new", FACTS, overwrite=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tool": "other", "facts": {}}', '{"tool": "aq-search", "facts": []}'],
)
def test_run_file_of_somebody_else_is_not_ours_even_to_overwrite(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StoreError, match="no search of ours"):
        claim_folder(tmp_path, FACTS, overwrite=True)
    assert (tmp_path / "run.json").read_text() == content


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="no search of ours"):
        claim_folder(tmp_path / "out", FACTS, overwrite=True)


def test_overwrite_removes_what_a_search_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, FACTS, overwrite=False)
    names = ("study.db", "best.json", "front.json", "trials.csv", "report.md", "report.html")
    inside = ("configs/trial-000.json", "assignments/x.json", "artifacts/y")
    for name in (*names, *inside):
        folder.write_text(name, "old")
    folder.write_text("my-model/weights", "mine")
    claim_folder(tmp_path, {**FACTS, "seed": 1}, overwrite=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"run.json", "my-model/weights"}


def test_assignment_comes_back_by_its_digest(tmp_path: Path) -> None:
    folder, assignment = RunFolder(tmp_path), Assignment({"a": "int4-g64", "b": "bf16"})
    assert not folder.has_assignment(assignment.digest)
    folder.save_assignment(assignment)
    assert folder.has_assignment(assignment.digest)
    assert folder.load_assignment(assignment.digest) == assignment


def test_configuration_of_a_trial_is_its_artifact(tmp_path: Path) -> None:
    folder, study = RunFolder(tmp_path / "out"), optuna.create_study()
    trials = [study.ask() for _ in range(2)]
    for trial, text in zip(trials, ("{}", "[]"), strict=True):
        folder.attach(trial, text)
    for trial, text in zip(trials, ("{}", "[]"), strict=True):
        (meta,) = get_all_artifact_meta(trial, storage=study._storage)
        assert (tmp_path / "out" / "artifacts" / meta.artifact_id).read_text() == text
        assert (meta.filename, meta.mimetype) == ("config.json", "application/json")


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": "int4-g64"}', "\udc80"])
def test_damaged_assignment_is_refused(content: str, tmp_path: Path) -> None:
    folder, assignment = RunFolder(tmp_path), Assignment({"a": "int8-g64"})
    folder.save_assignment(assignment)
    file = tmp_path / "assignments" / f"{assignment.digest}.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError, match="delete .* and run the same command again"):
        folder.load_assignment(assignment.digest)


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("front.json", "old")

    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    words = r"cannot write .*front.json .*No space.*it needs 3 bytes, \d+ are free in .*the same"
    with pytest.raises(StoreError, match=words):
        folder.write_text("front.json", "new")
    assert (tmp_path / "front.json").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["front.json"]


def test_digest_of_facts_ignores_their_order() -> None:
    assert facts_digest(FACTS) == facts_digest(dict(reversed(FACTS.items())))
    assert facts_digest(FACTS) != facts_digest({**FACTS, "seed": 1})


def test_study_elsewhere_is_found_again_and_its_password_is_not_kept(tmp_path: Path) -> None:
    claim_folder(tmp_path / "a", FACTS, overwrite=False)
    assert storage_of(tmp_path / "a") == f"sqlite:///{tmp_path / 'a' / 'study.db'}"
    for url in ("postgresql://u:secret@h/one", "postgresql://u:secret@h/two"):
        claim_folder(tmp_path / "a", FACTS, overwrite=False, storage=url)
        kept = url.replace(":secret", "").replace("postgresql:", "postgresql+psycopg:")
        assert storage_of(tmp_path / "a") == kept
        assert "secret" not in (tmp_path / "a" / "run.json").read_text()
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="give the --out of aq-search"):
            storage_of(path)

"""Copies on a disk of this machine: of the right content, bounded, and never needed."""

import hashlib
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.errors import StoreError
from alphaquant.models.pages import scratch as module
from alphaquant.models.pages.scratch import Scratch
from alphaquant.studies.inputs import load_source

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "far" / "layer.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights" * 100)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_copied_once_for_all_processes(file: Path, tmp_path: Path) -> None:
    first = Scratch(tmp_path / "near")
    copy = first.local(file, lambda: sha256(file))
    assert copy == tmp_path / "near" / "copies" / f"{sha256(file)}.safetensors"
    assert copy.read_bytes() == file.read_bytes()
    assert first.local(file, lambda: pytest.fail("it is known")) == copy
    second = Scratch(tmp_path / "near")
    assert second.local(file, lambda: sha256(file)) == copy
    assert [s.report()["copied"] for s in (first, second)] == [1, 0]
    assert first.report()["copied_bytes"] == 700
    assert "why" not in first.report()


def test_a_copy_that_was_changed_is_made_anew(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Scratch(tmp_path / "near").local(file, lambda: sha256(file))
    copy.write_bytes(b"other")
    again = Scratch(tmp_path / "near")
    assert again.local(file, lambda: sha256(file)).read_bytes() == file.read_bytes()
    assert "is damaged (its sha256 is another); it is copied anew" in caplog.text


def test_a_file_that_is_not_what_it_was_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="layer.safetensors is damaged .*made anew"):
        Scratch(tmp_path / "near").local(file, lambda: "0" * 64)
    assert list((tmp_path / "near" / "copies").iterdir()) == []


def test_a_full_disk_is_no_reason_to_stop_and_is_reported(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = Usage(100 << 30, 0, (1 << 30) + 699)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    near = Scratch(tmp_path / "near")
    assert near.local(file, lambda: sha256(file)) == file
    found = near.report()
    assert (found["copied"], found["read_where_they_are"]) == (0, 1)
    assert "1073742523 bytes are free in" in found["why"]
    assert "files are read from where they are, not from --scratch" in caplog.text
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", fail)
    other = Scratch(tmp_path / "near")
    assert other.local(file, lambda: "0" * 64) == file
    assert "No space left" in other.report()["why"]


def test_weights_and_bank_are_read_from_the_copy(tiny: Path, tmp_path: Path) -> None:
    """The originals may go when the copies are made: the model still has its weights."""
    far, near = tmp_path / "far", tmp_path / "near"
    shutil.copytree(tiny, far)
    plain = load_source(str(tiny), "cpu", "float32", cache=tmp_path / "cache")
    source = load_source(str(far), "cpu", "float32", cache=tmp_path / "cache", scratch=near)
    assert source.scratch is not None
    report = source.scratch.report()
    assert report["copied"] == report["files"] > 0
    shutil.rmtree(far)
    shutil.rmtree(tmp_path / "cache")
    for name, tensor in plain.map.model.state_dict().items():
        assert torch.equal(source.map.model.state_dict()[name], tensor)

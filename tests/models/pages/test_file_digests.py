"""Digests of files: read once, and again when a file was touched."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from alphaquant.models.pages import file_digests as module
from alphaquant.models.pages.file_digests import file_digests


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    found: list[str] = []

    def read(path: Path) -> str:
        found.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(module, "sha256_of", read)
    return found


def aged(path: Path, content: bytes, seconds: float) -> Path:
    path.write_bytes(content)
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_file_that_nobody_touches_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    a, b = aged(tmp_path / "a", b"1", 60), aged(tmp_path / "b", b"2", 60)
    memory = tmp_path / "deep" / "memory.json"
    first = file_digests([a, b], memory)
    assert first == {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in (a, b)}
    assert file_digests([a, b], memory) == first and reads == ["a", "b"]
    aged(b, b"3", 50)
    assert file_digests([a, b], memory)[b] != first[b]
    assert reads == ["a", "b", "b"]


def test_a_file_of_this_moment_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    fresh = aged(tmp_path / "a", b"1", 0)
    for _ in range(2):
        file_digests([fresh], tmp_path / "memory.json")
    assert reads == ["a", "a"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}'])
def test_a_memory_that_cannot_be_read_counts_for_nothing(
    tmp_path: Path, content: str, reads: list[str]
) -> None:
    memory, a = tmp_path / "memory.json", aged(tmp_path / "a", b"1", 60)
    memory.write_text(content)
    assert file_digests([a], memory) and reads == ["a"]
    assert file_digests([a], memory) and reads == ["a"]

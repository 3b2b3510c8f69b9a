"""JSON of others: what is read, and that nothing makes more than one line of trouble."""

from pathlib import Path

import pytest

from alphaquant.spaces import json_files
from alphaquant.spaces.json_files import (
    MAX_DEPTH,
    JsonError,
    parse_json,
    read_json,
    read_object,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_skipped(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"ä": [1]}', encoding=encoding)
    assert read_json(path) == read_object(path) == {"ä": [1]}
    assert parse_json(path.read_text(encoding="utf-8")) == {"ä": [1]}


def test_nesting_is_bounded_whatever_the_parser_can_do() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("3") == 3
    for depth in (MAX_DEPTH + 1, 1000, 100_000):
        for left, right in (("[", "]"), ('{"a":', "}")):
            with pytest.raises(JsonError, match="nested more than 64 deep"):
                parse_json(left * depth + "1" + right * depth)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1, column 1: not JSON"),
        (b'{"a": \xff}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"1" * 5000, "Exceeds the limit"),
        (b"[1]", "holds a list where an object {...} is needed"),
        (b"null", "holds a NoneType where"),
    ],
)
def test_what_cannot_be_read_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(JsonError) as caught:
        read_object(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_is_bounded_also_of_an_endless_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_BYTES", 1000)
    with pytest.raises(JsonError, match="longer than 1000 bytes"):
        read_json(Path("/dev/zero"))


def test_a_directory_is_refused_and_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(JsonError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")

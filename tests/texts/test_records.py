"""Objects of JSON files: lines, arrays, and what is neither."""

import json
from pathlib import Path

import pytest

from alphaquant.errors import DataError
from alphaquant.texts import records
from alphaquant.texts.records import read_records


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def read(path: Path) -> list[tuple[str, object]]:
    return [(r.where.removeprefix(str(path)), dict(r.fields)) for r in read_records(path)]


def test_lines_are_numbered_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"n": 1}\r\n\r\n  {"n": 2}')
    assert read(path) == [(", line 1", {"n": 1}), (", line 3", {"n": 2})]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_gives_its_objects(tmp_path: Path, indent: int | None) -> None:
    values = [{"text": f"{i}] , {{", "n": [i, {"m": None}]} for i in range(3)]
    path = write(tmp_path / "a.json", "\n " + json.dumps(values, indent=indent) + "\n")
    assert read(path) == [(f", item {i} of its array", v) for i, v in enumerate(values, 1)]


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": "x" * n} for n in (0, 1, 7, 40, 200)]
    path = write(tmp_path / "a.json", json.dumps(values, indent=3))
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(records, "_PIECE", size)
        assert [fields for _, fields in read(path)] == values


@pytest.mark.parametrize("text", ["", "\n\n", "[]", " [ ] \n"])
def test_a_file_may_hold_nothing(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path / "a.json", text)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('{"a": 1}\n[2]\n', r"line 2 is \[2\] and not a JSON object", id="list"),
        pytest.param('{"a": 1}\nnull\n', "line 2 is null and not a JSON object", id="null"),
        pytest.param('{\n"a": 1\n}\n', "line 1 is not JSON: Expecting.*one array", id="indented"),
        pytest.param('{"a": ' + "9" * 5000 + "}\n", "line 1 is not JSON: Exceeds", id="huge"),
        pytest.param('{"a": ' + "[" * 100_000, "line 1 is not JSON", id="deep"),
        pytest.param('[{"a": 1}, null]', "item 2 of its array begins with 'null", id="item null"),
        pytest.param('["ab"]\n', "item 1 of its array begins with", id="item text"),
        pytest.param('[{"a": 1} {"a": 2}]', "item 2 of its array has no comma", id="no comma"),
        pytest.param('[{"a": 1},]', r"item 2 of its array begins with '\]'", id="a comma more"),
        pytest.param('[{"a": 1}, {"b', "item 2 of its array is not JSON", id="cut in an item"),
        pytest.param('[{"a": 1}', "ends inside its array, behind item 1", id="cut behind"),
        pytest.param('[{"a": 1}]\n[]', "has something behind its array", id="two arrays"),
        pytest.param('[{"a": ' + "[" * 100_000, "item 1 of its array is not JSON", id="deep item"),
    ],
)
def test_what_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / "a.json", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["{}", "[{}]"], ids=["line", "item"])
def test_an_object_has_a_longest_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 100)
    monkeypatch.setattr(records, "_PIECE", 10)
    path = write(tmp_path / "a.json", form.replace("{}", json.dumps({"a": "x" * 500})))
    with pytest.raises(DataError, match="1.* is longer than 100 characters"):
        read(path)

"""JSON objects of a file, one after the other: one object per line, or one array of objects.

Memory stays bounded: neither a long file nor a long array is ever held whole. What the objects
mean is `documents.py`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from alphaquant.errors import DataError

MAX_RECORD = 1 << 26
"""Characters of one object at most; a longer one is a file of another kind."""

_PIECE = 1 << 16
"""Characters of an array that are read at once."""

_ADVICE = 'write one object per line, as in {"text": "..."}, or one array of such objects'


@dataclass(frozen=True)
class Record:
    """One object.

    Attributes:
        where: file and line, or item of an array, from 1; begins every message about it.
        fields: the object.
    """

    where: str
    fields: Mapping[str, Any]


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a file, read as they are asked for; blank lines are skipped.

    Raises:
        DataError: while reading, naming the line or the item that is no object.
    """
    with path.open(encoding="utf-8-sig") as handle:
        is_array = _skip_blank("", handle).startswith("[")
        handle.seek(0)
        yield from _array_records(handle, path) if is_array else _line_records(handle, path)


def shown(value: Any) -> str:
    """The beginning of a value, as it stands in the file."""
    return json.dumps(value)[:40]


def _line_records(handle: TextIO, path: Path) -> Iterator[Record]:
    number = 0
    while line := handle.readline(MAX_RECORD + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_RECORD:
            raise _too_long(where)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _no_json(where, error) from error
        if not isinstance(value, dict):
            raise DataError(f"{where} is {shown(value)} and not a JSON object; {_ADVICE}")
        yield Record(where, value)


def _array_records(handle: TextIO, path: Path) -> Iterator[Record]:
    """Objects of `[{...}, {...}]`, parsed one at a time."""
    text, number = _skip_blank("", handle)[1:], 0
    while (text := _skip_blank(text, handle)) and text[0] != "]":
        number += 1
        where = f"{path}, item {number} of its array"
        if number > 1:
            if text[0] != ",":
                raise DataError(f"{where} has no comma before it; {_ADVICE}")
            text = _skip_blank(text[1:], handle)
        value, text = _first_object(text, handle, where)
        yield Record(where, value)
    if not text:
        raise DataError(f"{path} ends inside its array, behind item {number}; complete the file")
    if _skip_blank(text[1:], handle):
        raise DataError(f"{path} has something behind its array; {_ADVICE}")


def _first_object(text: str, handle: TextIO, where: str) -> tuple[dict[str, Any], str]:
    """The object that the text begins with, and the text behind it; reads on as needed."""
    if not text.startswith("{"):
        raise DataError(f"{where} begins with {text[:20]!r} and is no JSON object; {_ADVICE}")
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
            return value, text[end:]
        except json.JSONDecodeError as error:
            if len(text) > MAX_RECORD:
                raise _too_long(where) from error
            more = handle.read(max(_PIECE, len(text)))  # doubled, so that retries stay linear
            if not more:
                raise _no_json(where, error) from error
            text += more
        except (ValueError, RecursionError) as error:
            raise _no_json(where, error) from error


def _skip_blank(text: str, handle: TextIO) -> str:
    """The text without blanks before it, read on until there is some; empty at the end."""
    while not (text := text.lstrip()):
        text = handle.read(_PIECE)
        if not text:
            break
    return text


def _no_json(where: str, error: Exception) -> DataError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
    return DataError(f"{where} is not JSON: {reason}; {_ADVICE}")


def _too_long(where: str) -> DataError:
    return DataError(f"{where} is longer than {MAX_RECORD} characters; {_ADVICE}")

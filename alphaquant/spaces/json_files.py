"""JSON of users and of earlier runs, read in one place: bounded, and refused in one line.

A text may be 64 MiB long and nested 64 deep, a byte order mark in front is skipped, and a key
stands once in an object. The largest files of ours, the reports of models with 100 000 matrices,
are a third of that. What the content means is the caller's.
"""

import codecs
import json
from pathlib import Path
from typing import Any

from alphaquant.errors import AlphaQuantError
from alphaquant.spaces.json_errors import syntax_text

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
"""Objects and lists inside each other; our files have at most 8."""


class JsonError(AlphaQuantError):
    """A text that is not JSON as described above; the message has no name of a file.

    Attributes:
        start: the first bytes of the file that was read, to tell what it is instead.
    """

    def __init__(self, message: str, start: bytes = b"") -> None:
        """Keep the message and the start."""
        super().__init__(message)
        self.start = start


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.

    Raises:
        JsonError: it is too long, nested too deep, no UTF-8, no JSON, or has a key twice.
    """
    if len(text) > MAX_BYTES:
        raise JsonError(f"it is longer than {MAX_BYTES} bytes; give a smaller file")
    too_deep = f"it is nested more than {MAX_DEPTH} deep; give a flatter file"
    try:
        if isinstance(text, bytes):
            text = text.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        text = text.removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise JsonError(syntax_text(error)) from error
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 ({error}); save it as UTF-8") from error
    except RecursionError as error:
        raise JsonError(too_deep) from error
    except ValueError as error:
        raise JsonError(str(error)) from error
    if not _is_flat(value):
        raise JsonError(too_deep)
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file; of an endless one only the beginning is read.

    Raises:
        FileNotFoundError: it is not there.
        JsonError: it cannot be read, or see `parse_json`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JsonError(f"it cannot be read: {error.strerror}") from error
    try:
        return parse_json(content)
    except JsonError as error:
        raise JsonError(str(error), content[:4096]) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        JsonError: it holds something else, or see `read_json`.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise JsonError(f"it holds a {type(value).__name__} where an object {{...}} is needed")
    return value


def _is_flat(value: Any) -> bool:
    """Whether nothing lies deeper than `MAX_DEPTH`; level by level, so no recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        parts = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return True
    return False


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; remove one of the two")
    return data

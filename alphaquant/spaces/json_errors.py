"""One-line texts for JSON files that cannot be read: where the problem is and what to change.

Every text starts with a JSON path, `overrides[2].wq`, or with line and column where the file is
not JSON at all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

MAX_PROBLEMS = 5
"""Problems that one message lists; more are counted."""

_NEEDED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "an object {...}"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list [...]"),
    "string_type": "a text in quotes",
    "string_too_short": "a text that is not empty",
    "bool_type": "true or false",
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    "float_type": "a number",
}
"""What is needed where pydantic found another type, in words of JSON."""

_UNION_TAGS = ("int", "float")
"""Parts that pydantic adds to the path of a field of two types."""


def path_text(path: Iterable[str | int]) -> str:
    """`overrides[2].extra.format` of its parts; the file itself is `top level`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".") or "top level"


def syntax_text(error: json.JSONDecodeError) -> str:
    """What is wrong where the text is not JSON; comments are pointed to the `comment` key."""
    place = f"line {error.lineno}, column {error.colno}"
    rest = error.doc[error.pos :].lstrip(", \t\r\n")
    for mark in ("//", "/*", "#"):
        if rest.startswith(mark):
            return f'{place}: JSON has no {mark} comments; put the remark in a "comment" key'
    return f"{place}: not JSON ({error.msg}); correct it there"


def validation_text(error: ValidationError, known_keys: Mapping[str, Sequence[str]]) -> str:
    """What is wrong where JSON does not follow its model, all in one line.

    Args:
        error: what pydantic found.
        known_keys: keys of each object, by the name of the object; the file itself is "".
    """
    problems = error.errors(include_url=False)
    texts = [_problem_text(problem, known_keys) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        texts.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(texts)


def _problem_text(problem: Any, known_keys: Mapping[str, Sequence[str]]) -> str:
    path = [part for part in problem["loc"] if part not in _UNION_TAGS]
    where = path_text(path)
    if problem["type"] == "extra_forbidden":
        parents = [part for part in path[:-1] if isinstance(part, str)]
        known = known_keys[parents[-1] if parents else ""]
        close = get_close_matches(str(path[-1]), known, n=1)
        change = f"did you mean {close[0]}?" if close else "remove it"
        return f"{where}: unknown key; known are {', '.join(known)}; {change}"
    if problem["type"] == "missing":
        return f"{where}: is required and missing; add it"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    if problem["type"] in _NEEDED:
        message = f"must be {_NEEDED[problem['type']]}"
    given = json.dumps(problem["input"], ensure_ascii=False, default=str)
    return f"{where}: {message}, not {given[:60]}; correct it"

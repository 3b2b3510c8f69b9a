"""Globs over module names, as the `pattern` of a configuration's overrides holds them.

A pattern is anchored at both ends and case-sensitive on every system::

    *         any characters, dots too, also none      model.layers.1.*   not model.layers.10.x
    ?         any one character
    [1-7]     one character of a set                   experts.[1-7].*    1..7, not 8, 17, 63
    [!ab]     one character outside a set
    {8..63}   one whole decimal number of a range      experts.{8..63}.*  8..63, not 7, 64, 108, 08

`{8..63}` takes a whole run of digits: in `experts.108` it matches nothing, since 108 is the number
that stands there. `]` as the first character of a set is a member of it. There is no escape
character; put a special character into a set of one, `[*]`, as `escape_pattern` does.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from alphaquant.errors import ConfigError

_SPECIAL = "*?[]{}"
_RANGE = re.compile(r"\{(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)\}")


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Translate a glob into a regular expression; use it with `fullmatch`.

    Args:
        pattern: the glob; see the file header.

    Returns:
        The compiled expression.

    Raises:
        ConfigError: the pattern is empty, a bracket or brace is not closed, or a range runs
            backwards.
    """
    if not pattern:
        raise ConfigError("the pattern is empty; name at least one module, or use * for all")
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "[":
            part, at = _translate_set(pattern, at)
        elif char == "{":
            part, at = _translate_range(pattern, at)
        elif char in "]}":
            raise _malformed(pattern, at, f"nothing opens this {char}", f"write [{char}]")
        else:
            part, at = {"*": ".*", "?": "."}.get(char, re.escape(char)), at + 1
        if part != ".*" or parts[-1:] != [".*"]:  # ** means *, and .*.* is slow to refuse
            parts.append(part)
    return re.compile("".join(parts), re.DOTALL)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of a name.

    Raises:
        ConfigError: the pattern is malformed.
    """
    return compile_pattern(pattern).fullmatch(name) is not None


def select_names(pattern: str, sorted_names: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in their order.

    Only names that share the pattern's literal start are tried: a configuration with one override
    per expert range resolves in seconds on 36 000 matrices, not in an hour.

    Args:
        pattern: the glob.
        sorted_names: names in ascending order.

    Raises:
        ConfigError: the pattern is malformed.
    """
    expression = compile_pattern(pattern)
    start = literal_start(pattern)
    found = []
    for index in range(bisect_left(sorted_names, start), len(sorted_names)):
        name = sorted_names[index]
        if not name.startswith(start):
            break
        if expression.fullmatch(name):
            found.append(name)
    return found


def literal_start(pattern: str) -> str:
    """The characters before the first special one: `model.layers.` of `model.layers.*.mlp`."""
    return pattern[: next((i for i, char in enumerate(pattern) if char in _SPECIAL), None)]


def escape_pattern(name: str) -> str:
    """A pattern that matches exactly this name: special characters become sets of one."""
    return "".join(f"[{char}]" if char in _SPECIAL else char for char in name)


def _translate_set(pattern: str, start: int) -> tuple[str, int]:
    """The expression of the set that opens at `start`, and the index after it."""
    negated = pattern.startswith("!", start + 1)
    first = start + 1 + negated
    end = pattern.find("]", first + 1)  # a ] that comes first is a member
    if end < 0:
        raise _malformed(pattern, start, "this [ is not closed", "close it with ], or write [[]")
    body = ""
    for low, high, single in re.findall("(?s)(.)-(.)|(.)", pattern[first:end]):
        if low > high:
            change = f"write {high}-{low}, or {{a..b}} for numbers above 9"
            raise _malformed(pattern, start, f"the range {low}-{high} runs backwards", change)
        body += re.escape(single) if single else f"{re.escape(low)}-{re.escape(high)}"
    return f"[{'^' * negated}{body}]", end + 1


def _translate_range(pattern: str, start: int) -> tuple[str, int]:
    """The expression of the numeric range that opens at `start`, and the index after it."""
    match = _RANGE.match(pattern, start)
    if match is None:
        change = "write two whole numbers without leading zeros, like {8..63}"
        raise _malformed(pattern, start, "this { opens no numeric range", change)
    low, high = int(match[1]), int(match[2])
    if low > high:
        change = f"write {{{high}..{low}}}"
        raise _malformed(pattern, start, f"the range {match[0]} runs backwards", change)
    return f"(?<![0-9])(?:{'|'.join(_digits_between(low, high))})(?![0-9])", match.end()


def _digits_between(low: int, high: int) -> list[str]:
    """Digit expressions that together match low..high: 8..63 gives [8-9], [1-5][0-9], 6[0-3].

    Each step takes the longest run that starts at `low` and lets its last `zeros` digits be free.
    """
    parts = []
    while low <= high:
        zeros = 0
        while low % 10 ** (zeros + 1) == 0 and low > 0 and low + 10 ** (zeros + 1) - 1 <= high:
            zeros += 1
        step = 10**zeros
        head, digit = divmod(low // step, 10)
        last = min(9, digit + (high - low + 1) // step - 1)
        parts.append(f"{head or ''}[{digit}-{last}]" + "[0-9]" * zeros)
        low += (last - digit + 1) * step
    return parts


def _malformed(pattern: str, index: int, problem: str, change: str) -> ConfigError:
    return ConfigError(f"pattern {pattern!r}, character {index + 1}: {problem}; {change}")

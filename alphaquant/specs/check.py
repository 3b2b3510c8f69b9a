"""Values of the wrong type or out of range, refused where a specification is made.

A command line and a file have been checked by cyclopts by then, with the same annotations; a call
from Python has no other check.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter, validators

from alphaquant.errors import ConfigError


def _whole_number(kind: type[int], tokens: Sequence[Any]) -> int:
    """The number of a command line or a file; cyclopts would round 1.5 to 2.

    Raises:
        ValueError: it is none.
    """
    text = tokens[0].value
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no whole number") from error


def whole(gte: int, lte: int | None = None) -> Parameter:
    """Annotation of an int: a whole number of a range.

    Args:
        gte: the least.
        lte: the greatest, None for any.
    """
    bounds = validators.Number(gte=gte, lte=lte)
    return Parameter(converter=_whole_number, validator=bounds)


Positive = Annotated[int, whole(1)]
"""A count of at least 1."""

Pair = Annotated[int, whole(2)]
"""A count of at least 2: what has a standard error."""

Natural = Annotated[int, whole(0)]
"""A number of at least 0."""

Share = Annotated[float, Parameter(validator=validators.Number(gte=0))]
"""A finite real number of at least 0."""

_SHOWN = 60
"""Characters of a value in a message."""


def check(spec: Any) -> None:
    """Refuse the first field of a dataclass whose value is not of its type or out of its range.

    Worked example: a field `trials: Positive` of "5" is refused with `trials is '5' (str); give
    int`, and 0 with `trials is 0; must be >= 1`. An int is a float too, a bool is no number; what
    is in a tuple or a mapping is not looked at.

    Raises:
        ConfigError: naming the field, its value and what is possible.
    """
    hints = get_type_hints(type(spec), include_extras=True)
    for field in fields(spec):
        value = getattr(spec, field.name)
        kinds = list(kinds_of(hints[field.name]))
        if not any(_is_of(value, kind) for kind, _ in kinds):
            raise ConfigError(f"{field.name} is {shown(value)}; {_wanted([k for k, _ in kinds])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} is {value}; give a finite number")
        for _, parameters in kinds:
            _check_range(field.name, value, parameters)


def check_kind(spec: Any, kind: type, function: str) -> None:
    """Refuse what is not the specification that a function takes.

    Raises:
        ConfigError: naming the function and what it takes.
    """
    if not isinstance(spec, kind):
        raise ConfigError(f"{function} is given {shown(spec)}; give a {kind.__name__}")


def kinds_of(hint: Any, outer: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types that an annotation allows, each with its metadata."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        yield from kinds_of(inner, (*outer, *metadata))
    elif get_origin(hint) in (UnionType, Union):
        for part in get_args(hint):
            yield from kinds_of(part, outer)
    else:
        yield hint, outer


def shown(value: Any) -> str:
    """A value and its type for a message, cut where it is long."""
    text = repr(value)
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return cut if value is None else f"{cut} ({type(value).__name__})"


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    plain = get_origin(kind) or kind
    if isinstance(value, bool):
        return plain is bool
    if plain is float:
        return isinstance(value, int | float)
    return isinstance(value, plain)


def _wanted(kinds: list[Any]) -> str:
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return f"use {' or '.join(words)}"
    return f"give {' or '.join(_name(kind) for kind in kinds)}"


def _name(kind: Any) -> str:
    return "None" if kind is NoneType else (get_origin(kind) or kind).__name__


def _check_range(name: str, value: Any, metadata: tuple[Any, ...]) -> None:
    if value is None:
        return
    for parameter in metadata:
        for validate in getattr(parameter, "validator", None) or ():
            try:
                validate(type(value), value)
            except ValueError as error:
                why = str(error).rstrip(".")
                raise ConfigError(f"{name} is {value!r}; {why[0].lower()}{why[1:]}") from error

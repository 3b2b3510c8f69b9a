"""Values of the wrong type, refused where a specification is made: callers have no other check."""

from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from alphaquant.errors import ConfigError

_SHOWN = 60
"""Characters of a value in a message."""


def check_types(spec: Any) -> None:
    """Refuse the first field of a dataclass whose value is not of its type.

    Worked example: a field `trials: int` of "5" is refused with `trials is '5' (str); give int`.
    An int is a float too, a bool is no number; what is in a tuple or a mapping is not looked at.

    Raises:
        ConfigError: naming the field, its value and its type.
    """
    hints = get_type_hints(type(spec))
    for field in fields(spec):
        value, hint = getattr(spec, field.name), hints[field.name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = " or ".join(_name(kind) for kind in kinds)
            raise ConfigError(f"{field.name} is {shown(value)}; give {wanted}")


def check_kind(spec: Any, kind: type, function: str) -> None:
    """Refuse what is not the specification that a function takes.

    Raises:
        ConfigError: naming the function and what it takes.
    """
    if not isinstance(spec, kind):
        raise ConfigError(f"{function} is given {shown(spec)}; give a {kind.__name__}")


def check_least(name: str, value: float | None, least: int) -> None:
    """Refuse a number that is too small, or NaN; None is none.

    Raises:
        ConfigError: naming the field.
    """
    if value is not None and not value >= least:
        raise ConfigError(f"{name} is {value}; use {least} or more")


def shown(value: Any) -> str:
    """A value and its type for a message, cut where it is long."""
    text = repr(value)
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return cut if value is None else f"{cut} ({type(value).__name__})"


def _is_of(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    if isinstance(value, bool):
        return plain is bool
    if plain is float:
        return isinstance(value, int | float)
    return isinstance(value, plain)


def _name(kind: Any) -> str:
    return "None" if kind is type(None) else (get_origin(kind) or kind).__name__

"""Specifications by subject, and the flat list of names by which people set their fields.

`SearchSpec.texts.calibration_samples` is `--calibration-samples` on a command line,
`calibration_samples=` in Python and `calibration_samples = ` in a file.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter
from docstring_parser import parse_from_object

from alphaquant.errors import ConfigError
from alphaquant.specs.check import check, kinds_of, shown

T = TypeVar("T")


def subject(title: str, place: int) -> Parameter:
    """Annotation of a part of a specification: its options stand together in `--help`.

    Args:
        title: of the group.
        place: among the groups, from 0.
    """
    return Parameter(name="*", group=Group(title, sort_key=place))


@dataclass(frozen=True)
class Option:
    """One field of a specification.

    Attributes:
        name: as in Python and in files.
        subject: title of its group, empty for none.
        hint: its annotation.
        default: its default, `dataclasses.MISSING` where it must be given.
        text: what it means.
    """

    name: str
    subject: str
    hint: Any
    default: Any
    text: str


def options_of(kind: type[Any], title: str = "") -> Iterator[Option]:
    """Every option of a specification, parts included, in order."""
    hints, texts = get_type_hints(kind, include_extras=True), texts_of(kind)
    for field in fields(kind):
        part = part_of(hints[field.name])
        if part is None:
            hint, default = hints[field.name], _default_of(field)
            yield Option(field.name, title, hint, default, texts[field.name])
        else:
            yield from options_of(part, _title_of(hints[field.name]) or title)


def make(kind: type[T], settings: Mapping[str, Any], what: str) -> T:
    """The specification of flat settings.

    Args:
        kind: its class.
        settings: fields of it and of its parts by name, or whole parts. A list where a text is
            wanted is joined by commas, a number there is written out, as on a command line, and a
            text where a path is wanted is one.
        what: is asked for, in messages: `search`.

    Raises:
        ConfigError: an unknown name, a missing one, or a value that makes no sense.
    """
    known = [option.name for option in options_of(kind)]
    parts = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known and name not in parts:
            near = get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
            raise ConfigError(f"{what} has no setting {name!r}; perhaps {', '.join(near)}")
    for option in options_of(kind):
        if option.default is MISSING and option.name not in settings:
            raise ConfigError(f"{what} needs {option.name}; {option.text}")
    return _made(kind, settings)


def read_file(path: str | Path) -> dict[str, Any]:
    """The options of a TOML file, flat; a list of texts is one text with commas.

    Raises:
        ConfigError: it cannot be read, is no TOML, or has a table or another file in it.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"spec {path}: {reason}; give a TOML file of options") from error
    for name, value in found.items():
        if isinstance(value, dict) or name == "spec":
            what = "a table" if isinstance(value, dict) else "another file"
            raise ConfigError(f"spec {path}: {name} is {what}; name the options, NAME = VALUE")
    return {name: _joined(value) for name, value in found.items()}


def flat(spec: Any) -> dict[str, Any]:
    """All fields of a specification and its parts by name; the opposite of `make`."""
    found: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        found |= flat(value) if is_dataclass(value) else {field.name: value}
    return found


def replaced(spec: T, **changes: Any) -> T:
    """A specification with some fields changed, by flat names or as whole parts.

    Raises:
        ConfigError: an unknown name, or a value that makes no sense.
    """
    parts = {name: value for name, value in changes.items() if is_dataclass(value)}
    inner = {name for part in parts.values() for name in flat(part)}
    same = {name: value for name, value in flat(spec).items() if name not in inner}
    return make(type(spec), {**same, **changes}, type(spec).__name__)


def optional(kind: type[Any], name: str) -> type[Any]:
    """A copy of a class without parts whose every field may be left out, as None.

    For options that change what a configuration file says.

    Args:
        kind: a specification.
        name: of the new class.
    """
    hints, texts = get_type_hints(kind, include_extras=True), texts_of(kind)
    rows: list[Any] = []
    for f in fields(kind):
        text = texts[f.name]
        if "Default:" not in text:
            text += f" Default: what the configuration says, else {f.default}."
        rows.append((f.name, Annotated[hints[f.name] | None, Parameter(help=text)], None))
    about = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__post_init__": check}
    return make_dataclass(name, rows, frozen=True, kw_only=True, namespace=about)


def part_of(hint: Any) -> type[Any] | None:
    """The specification that an annotation names, None where it is no part of one."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def texts_of(kind: Any) -> Mapping[str, str]:
    """What the text below each field says, in one line each."""
    classes = reversed([c for c in kind.__mro__ if is_dataclass(c)])
    below = [p for c in classes for p in parse_from_object(c).params]
    found = {p.arg_name: p.description or "" for p in below}
    hints = get_type_hints(kind, include_extras=True)
    given = {
        name: parameter.help
        for name, hint in hints.items()
        for _, metadata in kinds_of(hint)
        for parameter in metadata
        if isinstance(parameter, Parameter) and parameter.help
    }
    return {name: " ".join(text.split()) for name, text in (found | given).items()}


def _default_of(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _title_of(hint: Any) -> str:
    if get_origin(hint) is not Annotated:
        return ""
    groups = [g for p in get_args(hint)[1:] for g in getattr(p, "group", None) or ()]
    return str(groups[0].name) if groups else ""


def _made(kind: type[T], settings: Mapping[str, Any]) -> T:
    hints, values = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):  # type: ignore[arg-type]
        part = part_of(hints[field.name])
        if part is not None and isinstance(settings.get(field.name), part):
            _refuse_both(part, field.name, settings)
            values[field.name] = settings[field.name]
        elif part is not None and field.name in settings:
            given, wanted = shown(settings[field.name]), part.__name__
            raise ConfigError(f"{field.name} is {given}; give a {wanted}, or its fields")
        elif part is not None:
            values[field.name] = _made(part, settings)
        elif field.name in settings:
            values[field.name] = _fitted(hints[field.name], field.name, settings[field.name])
    return kind(**values)


def _refuse_both(part: type[Any], name: str, settings: Mapping[str, Any]) -> None:
    """A whole part, and a field of it beside it, contradict each other."""
    twice = [option.name for option in options_of(part) if option.name in settings]
    if twice:
        raise ConfigError(f"{name} and {', '.join(twice)} are both given; give one of the two")


def _fitted(hint: Any, name: str, value: Any) -> Any:
    """A value as its field has it: a list or a number as a text, a text as a path."""
    kinds = {kind for kind, _ in kinds_of(hint)} - {NoneType}
    if kinds == {str} and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple) and str in kinds:
        if isinstance(_joined(value), str):
            return _joined(value)
        raise ConfigError(f"{name} is {shown(value)}; give names")
    if isinstance(value, Path) and str in kinds:
        return str(value)
    return Path(value) if isinstance(value, str) and Path in kinds else value


def _joined(value: Any) -> Any:
    """A list of texts as one text, anything else as it is."""
    is_texts = isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    return ",".join(value) if is_texts else value

"""The configuration file: which format each matrix gets, as people and searches write it.

Overrides apply in file order and field by field; the last one that matches wins per field, and
`skip` stays until an explicit `"skip": false`. Fields that nothing sets: `wq` and `aq` bf16,
`group_size` the default of the format, symmetric. `comment`, `summary`, `search_summary`,
`alpha_hill`, `category` and `precision` are carried and never interpreted.

`group_size`, `symmetric`, `super_block` and `extra` speak of the `wq` that stands with them or
before them. Under a later `wq` that cannot have them (an override to mxfp4 under an int4 default)
they do not count, and neither does a super-block under a later group size or asymmetry that it
cannot have. Written together with or after such a `wq`, a group size is ignored with one warning,
an asymmetry, super-block or element is an error. On a matrix that resolves to bf16 none counts.

Worked example: under `{"default": {"wq": "int4", "group_size": 64}, "overrides": [{"pattern":
"*.down_proj", "wq": "int3"}, {"pattern": "*.experts.{0..7}.*", "symmetric": false}]}` the matrix
`model.layers.0.mlp.experts.3.down_proj` is int3-g64-asym, expert 9's is int3-g64.

Routers and norms are not among the matrices of an inventory and stay as they are; naming them with
a `wq` gives a warning. lm_head and embeddings are among them where `include` says so: `"include":
["head", "embeddings"]`; tied ones are both. The keys are in `alphaquant.spaces.schema`, patterns
in `alphaquant.spaces.patterns`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alphaquant.errors import ConfigError, FormatError
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.foreign import READABLE, file_kind, tool_of, way_text
from alphaquant.spaces.formats import (
    ASYMMETRIC_KINDS,
    BF16,
    PER_ROW,
    Format,
    can_be_super,
    elements_of,
    make_format,
    parse_format,
)
from alphaquant.spaces.json_errors import validation_text
from alphaquant.spaces.json_files import JsonError, parse_json, read_json
from alphaquant.spaces.patterns import escape_pattern, select_names
from alphaquant.spaces.schema import KNOWN_KEYS, Config, Override, Scheme
from alphaquant.spaces.units import Inventory, Matrix

__all__ = [
    "Config",
    "Override",
    "Plan",
    "ResolvedScheme",
    "Scheme",
    "config_from_assignment",
    "dump_config",
    "load_config",
    "parse_config",
    "resolve",
]


@dataclass(frozen=True)
class ResolvedScheme:
    """What a configuration says about one matrix.

    Attributes:
        weight_format: how its weights are stored; bf16 when skipped.
        activation: what its inputs are rounded to, per token; bf16 leaves them.
        skip: whether the configuration says to leave it alone.
    """

    weight_format: Format
    activation: Format = BF16
    skip: bool = False


@dataclass(frozen=True)
class Plan:
    """What a configuration says about a model.

    Attributes:
        schemes: matrix name -> scheme, for every matrix, in inventory order.
        unmatched_patterns: patterns that match nothing in the model.
        warnings: what the user should know, one line per cause.
    """

    schemes: Mapping[str, ResolvedScheme]
    unmatched_patterns: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def assignment(self) -> Assignment:
        """The formats alone; skipped matrices are bf16."""
        return Assignment({name: s.weight_format.name for name, s in self.schemes.items()})


def load_config(path: str | Path) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: the file cannot be read, is another tool's or is not a valid configuration.
    """
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}; give a JSON file in UTF-8"
        ) from error
    except JsonError as error:
        kind = file_kind(Path(path), error.start)
        if kind is not None:
            raise ConfigError(way_text(Path(path), kind, can_read=False)) from error
        raise ConfigError(f"{path}: {error}") from error
    tool = tool_of(data)
    if tool is not None:
        what, can_read = f"a configuration of {tool}", tool in READABLE
        raise ConfigError(way_text(Path(path), what, can_read=can_read))
    return _config_of(data, str(path))


def parse_config(text: str, source: str = "config") -> Config:
    """Read a configuration.

    Args:
        text: JSON.
        source: where it came from, for messages.

    Raises:
        ConfigError: not JSON, or not a configuration; the message carries source and JSON path.
    """
    try:
        data = parse_json(text)
    except JsonError as error:
        raise ConfigError(f"{source}: {error}") from error
    return _config_of(data, source)


def _config_of(data: Any, source: str) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {validation_text(error, KNOWN_KEYS)}") from error


def dump_config(config: Config) -> str:
    """Write a configuration as JSON, one override per line, only the fields that are set.

    Returns:
        Text that `parse_config` reads back as an equal configuration.
    """
    data = config.model_dump(exclude_unset=True)
    overrides = [json.dumps(item, ensure_ascii=False) for item in data.get("overrides", ())]
    lines = []
    for key, value in data.items():
        text = json.dumps(value, ensure_ascii=False, indent=None if key == "default" else 2)
        if key == "overrides" and overrides:
            text = "[\n" + ",\n".join(f"    {item}" for item in overrides) + "\n  ]"
        elif key != "overrides":
            text = text.replace("\n", "\n  ")
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def resolve(config: Config, inventory: Inventory, *, strict: bool = False) -> Plan:
    """Apply a configuration to a model.

    Args:
        config: the configuration.
        inventory: the model's matrices and kept tensors.
        strict: whether a pattern that matches nothing is an error.

    Raises:
        ConfigError: fields that do not go together on some matrix, or, with `strict`, a pattern
            that matches nothing.
    """
    matches = _match_overrides(config, inventory)
    unmatched = [_unmatched_text(config, inventory, index) for index in matches.unmatched]
    if strict and unmatched:
        raise ConfigError("; ".join(unmatched))
    folded: dict[tuple[int, ...], _Folded] = {}
    schemes: dict[str, ResolvedScheme] = {}
    ignored: list[str] = []
    for matrix in inventory.matrices:
        if not matrix.is_included(config.include):
            schemes[matrix.name] = ResolvedScheme(BF16)
            continue
        hits = tuple(matches.of_matrix[matrix.name])
        if hits not in folded:
            folded[hits] = _fold(config, hits, matrix.name)
        schemes[matrix.name] = folded[hits].scheme
        _check_width(matrix, folded[hits].scheme.weight_format)
        if folded[hits].ignored_group_size is not None:
            ignored.append(f"{folded[hits].ignored_group_size} on {matrix.name}")
    kept = [_kept_text(config, index, names) for index, names in matches.kept.items()]
    return Plan(
        schemes,
        tuple(config.overrides[index].pattern for index in matches.unmatched),
        (*unmatched, *kept, *_group_size_texts(ignored), *_nothing_texts(config, schemes)),
    )


def _check_width(matrix: Matrix, fmt: Format) -> None:
    if not fmt.fits(matrix.cols):
        raise ConfigError(
            f"{matrix.name} has {matrix.cols} inputs, and {fmt.name} has blocks of "
            f"{fmt.group_size}; give it a format of smaller blocks, such as nl4-g32"
        )


def config_from_assignment(
    assignment: Assignment,
    inventory: Inventory,
    summary: Mapping[str, object] | None = None,
    *,
    rotate: int | None = None,
) -> Config:
    """The configuration that resolves to an assignment.

    The default is the most common format; every other matrix has exactly one override, in which
    consecutive experts of one layer, projection and format share a range `{8..63}`.

    Args:
        assignment: a format for every matrix of the inventory.
        inventory: the model's matrices.
        summary: numbers of the search, carried in the file.
        rotate: seed of the rotation of the residual stream, None for none.

    Raises:
        ConfigError: the assignment and the inventory have different matrices.
    """
    if assignment.formats.keys() != inventory.by_name.keys():
        odd = sorted(assignment.formats.keys() ^ inventory.by_name.keys())
        raise ConfigError(
            f"the assignment has {len(assignment.formats)} matrices, the model has "
            f"{len(inventory.matrices)}, and {len(odd)} are only in one of them, e.g. {odd[0]}; "
            "use an assignment of this model"
        )
    formats = {name: parse_format(text) for name, text in assignment.formats.items()}
    default = Counter(formats[m.name] for m in inventory.matrices).most_common(1)[0][0]
    groups: dict[tuple[tuple[str, ...], Format], list[int]] = {}
    for matrix in inventory.matrices:
        fmt = formats[matrix.name]
        if fmt != default:
            groups.setdefault((_stem(matrix), fmt), []).append(matrix.expert or 0)
    overrides = [
        {"pattern": pattern, **_scheme_fields(fmt, default)}
        for (stem, fmt), experts in groups.items()
        for pattern in _patterns(stem, experts)
    ]
    data: dict[str, object] = {
        **({"include": inventory.include} if inventory.include else {}),
        "default": {**_scheme_fields(default, default), "aq": "bf16"},
        "overrides": overrides,
        **({} if rotate is None else {"rotate": rotate}),
    }
    return Config.model_validate(data if summary is None else {**data, "summary": dict(summary)})


@dataclass(frozen=True)
class _Matches:
    """Which overrides match what, by index in the file.

    Attributes:
        of_matrix: matrix name -> overrides that match it, in order.
        kept: overrides that ask to quantize and match kept tensors only -> names of those.
        unmatched: overrides that match nothing.
    """

    of_matrix: Mapping[str, list[int]]
    kept: Mapping[int, list[str]]
    unmatched: Sequence[int]


def _match_overrides(config: Config, inventory: Inventory) -> _Matches:
    owners = {alias: m.name for m in inventory.matrices for alias in m.aliases}
    owners |= {m.name: m.name for m in inventory.matrices}
    kept_owners = {
        module: kept.name
        for kept in inventory.kept
        for name in (kept.name, *kept.aliases)
        for module in (name, name.removesuffix(".weight").removesuffix(".bias"))
    }
    names, kept_names = sorted(owners), sorted(kept_owners)
    of_matrix: dict[str, list[int]] = {m.name: [] for m in inventory.matrices}
    kept: dict[int, list[str]] = {}
    unmatched: list[int] = []
    for index, override in enumerate(config.overrides):
        hits = dict.fromkeys(owners[name] for name in select_names(override.pattern, names))
        for name in hits:
            of_matrix[name].append(index)
        if hits:
            continue
        found = dict.fromkeys(kept_owners[n] for n in select_names(override.pattern, kept_names))
        if not found:
            unmatched.append(index)
        elif override.skip is not True and {override.wq, override.aq} - {None, "bf16"}:
            kept[index] = list(found)
    return _Matches(of_matrix, kept, unmatched)


@dataclass(frozen=True)
class _Folded:
    """The scheme of the matrices that the same overrides match."""

    scheme: ResolvedScheme
    ignored_group_size: int | None = None


def _fold(config: Config, hits: Sequence[int], matrix_name: str) -> _Folded:
    """Merge the default and some overrides field by field; the last that sets a field wins."""
    parts = [config.default, *(config.overrides[index] for index in hits)]
    if _last(parts, "skip")[1]:
        return _Folded(ResolvedScheme(BF16, BF16, True))
    activation = make_format(_last(parts, "aq")[1] or "bf16", PER_ROW)
    wq_at, kind = _last(parts, "wq")
    if kind in (None, "bf16"):
        return _Folded(ResolvedScheme(BF16, activation))
    group_at, group_size = _last(parts, "group_size")
    symmetric_at, symmetric = _last(parts, "symmetric")
    super_at, super_size = _last(parts, "super_block")
    extra_at, extra = _last(parts, "extra")
    element = extra.format if extra else None
    if symmetric_at < wq_at and kind not in ASYMMETRIC_KINDS:
        symmetric = True
    is_old = super_at < max(wq_at, group_at, symmetric_at)
    if is_old and not can_be_super(kind, group_size, symmetric=symmetric is not False):
        super_size = 0
    if extra_at < wq_at and element not in elements_of(kind):
        element = None
    try:
        weight = make_format(
            kind,
            group_size,
            symmetric=symmetric is not False,
            element=element,
            super_size=super_size or 0,
        )
    except FormatError as error:
        culprit = symmetric_at if symmetric is False else max(extra_at, super_at)
        where = ["default", *(_override_text(config, index) for index in hits)][culprit]
        raise ConfigError(f"{where}, on {matrix_name}: {error}") from error
    fixed = weight.shared.block
    is_ignored = fixed not in (None, group_size) and group_at >= max(wq_at, 0)
    return _Folded(ResolvedScheme(weight, activation), group_size if is_ignored else None)


def _last(parts: Sequence[Scheme], field: str) -> tuple[int, Any]:
    """Index and value of a field in the last part that sets it; (-1, None) where none does."""
    for index in reversed(range(len(parts))):
        value = getattr(parts[index], field)
        if value is not None:
            return index, value
    return -1, None


def _override_text(config: Config, index: int) -> str:
    return f"overrides[{index}] (pattern {config.overrides[index].pattern!r})"


def _unmatched_text(config: Config, inventory: Inventory, index: int) -> str:
    return (
        f"{_override_text(config, index)} matches nothing in this {inventory.model_type} model, "
        f"whose names look like {inventory.matrices[-1].name}; correct or remove it"
    )


def _kept_text(config: Config, index: int, names: Sequence[str]) -> str:
    return (
        f"{_override_text(config, index)} names only tensors that are not quantized "
        f"({len(names)}, e.g. {names[0]}): they stay bf16; remove it, set skip, or for "
        'lm_head and embeddings say "include": ["head", "embeddings"]'
    )


def _group_size_texts(ignored: Sequence[str]) -> list[str]:
    if not ignored:
        return []
    return [
        f"group_size is ignored for {len(ignored)} matrices in formats whose blocks are fixed "
        f"(mxfp, nvfp, llama.cpp's), e.g. {ignored[0]}; leave it out"
    ]


def _nothing_texts(config: Config, schemes: Mapping[str, ResolvedScheme]) -> list[str]:
    """A warning where a configuration changes nothing and its default does not ask for that."""
    if config.default.wq is not None or config.default.skip:
        return []
    for scheme in schemes.values():
        if scheme.weight_format.is_quantized or scheme.activation.is_quantized:
            return []
    return [
        f"nothing is quantized: all {len(schemes)} matrices stay bf16; name a wq in default or "
        'overrides, such as {"default": {"wq": "int4", "group_size": 64}}'
    ]


def _stem(matrix: Matrix) -> tuple[str, ...]:
    """What stands before and after the expert's index in a name; the name where it has none."""
    parts = matrix.name.split(".")
    places = [i for i, part in enumerate(parts) if part == str(matrix.expert)]
    if not places:
        return (matrix.name,)
    return ".".join([*parts[: places[-1]], ""]), ".".join(["", *parts[places[-1] + 1 :]])


def _patterns(stem: tuple[str, ...], experts: Sequence[int]) -> Iterator[str]:
    """One pattern per run of consecutive experts; the name itself where the stem is whole."""
    if len(stem) == 1:
        yield escape_pattern(stem[0])
        return
    head, tail = map(escape_pattern, stem)
    numbered = enumerate(sorted(experts))
    for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        low, high = numbers[0], numbers[-1]
        index = str(low) if low == high else f"{{{low}..{high}}}"
        yield f"{head}{index}{tail}"


def _scheme_fields(fmt: Format, default: Format) -> dict[str, object]:
    """The fields that give a format, also on top of the fields of the default format."""
    fields: dict[str, object] = {"wq": fmt.kind}
    if fmt.has_groups:
        fields["group_size"] = fmt.group_size
    if fmt.super_size or (default.super_size and fmt.has_groups):
        fields["super_block"] = fmt.super_size
    if fmt.family == "int" and not (fmt.symmetric and default.symmetric):
        fields["symmetric"] = fmt.symmetric
    if (
        fmt.element
        and not fmt.is_ggml
        and not (_has_usual_element(fmt) and _has_usual_element(default))
    ):
        fields["extra"] = {"format": fmt.element}
    return fields


def _has_usual_element(fmt: Format) -> bool:
    return not fmt.element or fmt.is_ggml or fmt.element == elements_of(fmt.kind)[0]

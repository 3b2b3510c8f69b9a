r"""Regular expressions that name many matrices of a model in few words.

    model.layers.0.mlp.experts.0.up_proj ... model.layers.1.mlp.experts.63.up_proj
    -> ^model\.layers\.(0|1)\.mlp\.experts\.\d+\.up_proj$

Engines try every expression on every layer, and compile it each time when there are more than a
few hundred: one for each of 18,000 experts' matrices would take minutes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

_Key = tuple[str, ...]


def name_patterns(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    r"""Anchored expressions that match these names and no other known one.

    Args:
        names: dotted names of modules.
        known: every name that must be told apart, `names` among them.

    Returns:
        Expressions such as `^model\.layers\.(0|2)\.self_attn\.q_proj$`, sorted.
    """
    wanted, everything = _by_shape(names), _by_shape(known)
    found = []
    for shape, numbers in wanted.items():
        found += _patterns(shape, numbers, everything[shape])
    return tuple(sorted(found))


def _by_shape(names: Iterable[str]) -> dict[_Key, list[_Key]]:
    """Names without their numbers -> the numbers."""
    shapes: dict[_Key, list[_Key]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple("" if part.isdecimal() else part for part in parts)
        shapes.setdefault(shape, []).append(tuple(p for p in parts if p.isdecimal()))
    return shapes


def _patterns(shape: _Key, numbers: Sequence[_Key], known: Sequence[_Key]) -> list[str]:
    """Expressions of one shape; layers come first, so that others are grouped below them."""
    if not numbers[0]:
        return [_pattern(shape, [])]
    below, below_known = _below(numbers), _below(known)
    layers: dict[tuple[str, ...], list[str]] = {}
    for layer, rest in below.items():
        if not rest[0]:
            inner: list[tuple[str, ...]] = [()]
        elif set(rest) == set(below_known[layer]):
            inner = [tuple(r"\d+" for _ in rest[0])]
        else:
            inner = rest
        for numbers_below in inner:
            layers.setdefault(numbers_below, []).append(layer)
    return [_pattern(shape, [_one_of(own), *rest]) for rest, own in layers.items()]


def _below(numbers: Sequence[_Key]) -> Mapping[str, list[_Key]]:
    """First number -> the others."""
    found: dict[str, list[_Key]] = {}
    for first, *rest in numbers:
        found.setdefault(first, []).append(tuple(rest))
    return found


def _one_of(numbers: Sequence[str]) -> str:
    ordered = sorted(set(numbers), key=int)
    return ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"


def _pattern(shape: _Key, numbers: Sequence[str]) -> str:
    left = iter(numbers)
    parts = [re.escape(part) if part else next(left) for part in shape]
    return "^" + r"\.".join(parts) + "$"

"""Weights in kernel order, taken apart into tensors and a text, and put together again.

Operators of torch and buffers of modules hold tensors and plain facts, not dataclasses. The text
is JSON: a dataclass is an object with its name, a tensor its number.

    KernelWeight(element="int4", words=w, ...)  ->  [w, ...]
    {"KernelWeight": {"element": "int4", ..., "words": {"tensor": 0}, ...}}
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from alphaquant.kernels.moe.plan import ExpertStacks, FormatOrder, GroupedExperts
from alphaquant.kernels.order import KernelWeight

_TENSOR = "tensor"
_CLASSES = {c.__name__: c for c in (KernelWeight, FormatOrder, ExpertStacks, GroupedExperts)}


class Parts(NamedTuple):
    """A weight, or the experts of a layer, taken apart.

    Attributes:
        tensors: all of them, as they are, not copies.
        facts: everything else, as text.
    """

    tensors: list[Tensor]
    facts: str


def take_apart(value: KernelWeight | GroupedExperts) -> Parts:
    """The tensors of a value, and its other facts."""
    tensors: list[Tensor] = []

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return {_TENSOR: len(tensors) - 1}
        if is_dataclass(part):
            own = {f.name: visit(getattr(part, f.name)) for f in fields(part)}
            return {type(part).__name__: own}
        return [visit(p) for p in part] if isinstance(part, tuple) else part

    return Parts(tensors, json.dumps(visit(value)))


def put_together(tensors: Sequence[Tensor], facts: str) -> Any:
    """Undo `take_apart`.

    Args:
        tensors: of `Parts`, or the same ones on another device.
        facts: of `Parts`.
    """

    def build(part: Any) -> Any:
        if isinstance(part, list):
            return tuple(build(p) for p in part)
        if not isinstance(part, dict):
            return part
        ((name, own),) = part.items()
        if name == _TENSOR:
            return tensors[own]
        return _CLASSES[name](**{key: build(value) for key, value in own.items()})

    return build(read_facts(facts))


@lru_cache(maxsize=4096)
def read_facts(facts: str) -> dict[str, Any]:
    """The facts as JSON gives them, read once; not to be written to."""
    read: dict[str, Any] = json.loads(facts)
    return read

"""Small models whose experts are as wide as groups of 128, for exports to other engines.

They have two layers, hidden 256, experts of width 128, and a spread of weights at which logits
depend on every matrix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alphaquant.exports.writing import EXPORTERS, export_packed
from alphaquant.models.mapping import map_model
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix
from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import save_packed

SERVED_FAMILIES = ("llama", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
"""Architectures that engines were tried with."""

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "head_dim": 64,
    "initializer_range": 0.06,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 256},
    "olmoe": {"num_key_value_heads": 4, "head_dim": None},
    "qwen2_moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "head_dim": None,
    },
    "qwen3_moe": {"intermediate_size": 256, "moe_intermediate_size": 128},
}

Choice = Callable[[Matrix], str]
"""The format of a matrix."""


def served_model(family: str, **changes: Any) -> nn.Module:
    """A tiny model of one of `SERVED_FAMILIES`, as of `alphaquant.testing.models.tiny_model`."""
    sizes = {**_SIZES, **_OWN.get(family, {}), **changes}
    return tiny_model(family, **{name: v for name, v in sizes.items() if v is not None})


def plan_of(model: nn.Module, choose: Choice) -> Assignment:
    """An assignment by a function of the matrix."""
    return Assignment({m.name: choose(m) for m in map_model(model).inventory.matrices})


def save_export(
    model: nn.Module, folder: Path, choose: Choice, export: str, *, is_checked: bool = True
) -> Path:
    """Write a model rounded to nearest as an export, and our packed checkpoint beside it.

    Args:
        model: from `served_model`, not changed.
        folder: to write `packed` and `out` into.
        choose: format of every matrix.
        export: name of the exporter.
        is_checked: whether the plan is checked first, as `aq-quantize` does.

    Returns:
        The directory of the export.
    """
    exporter, assignment = EXPORTERS[export], plan_of(model, choose)
    if is_checked:
        exporter.check(assignment, map_model(model))
    save_packed(model, folder / "packed", assignment)
    out = folder / "out"
    out.mkdir()
    export_packed(exporter, folder / "packed", out)
    return out


def relative_difference(logits: Tensor, reference: Tensor) -> float:
    """Median over tokens of |logits - reference| / |reference|, both [T, V]."""
    distance = (logits - reference).norm(dim=-1) / reference.norm(dim=-1)
    return float(distance.median())

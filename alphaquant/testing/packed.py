"""Packed checkpoints with many formats, for tests of what loads, serves or exports them.

    save_packed(tiny_model("olmoe"), folder)
    save_export(served_model("olmoe"), folder, lambda matrix: "int4-g128", "gptq")

The models for exports have hidden 256 and experts of width 128, so that groups of 128 divide both,
and a spread of weights at which logits depend on every matrix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alphaquant.exports.writing import EXPORTERS, export_packed
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.runtime.checkpoint import CheckpointWriter
from alphaquant.runtime.integrity import write_checksums
from alphaquant.runtime.parts import open_part
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import MENUS
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.formats import draw_weights
from alphaquant.testing.models import tiny_model

_RTN = QuantSettings(method="rtn")


def draw_packed(name: str, rows: int, cols: int) -> PackedMatrix:
    """A random matrix in a format, rounded to nearest; the same for the same sizes."""
    weight, fmt = draw_weights(rows, cols), parse_format(name)
    if not fmt.is_quantized:
        return pack_bf16(weight)
    return quantize_rtn(weight[None], fmt, "minmax").pack_all()[0]


def mixed_assignment(model_map: ModelMap) -> Assignment:
    """Every format of the menus, one matrix after the other."""
    formats = sorted(MENUS["all"])
    matrices = model_map.inventory.matrices
    return Assignment({m.name: formats[i % len(formats)] for i, m in enumerate(matrices)})


def quantize_mixed(
    model_map: ModelMap, assignment: Assignment | None = None
) -> dict[int, list[QuantizedMatrix]]:
    """The matrices of every layer and of what is beside them, rounded to nearest.

    Args:
        model_map: the model.
        assignment: their formats; None for `mixed_assignment`.
    """
    assignment = mixed_assignment(model_map) if assignment is None else assignment
    names = sorted(set(assignment.formats.values()))
    parts = model_map.layers if model_map.ends is None else (*model_map.layers, model_map.ends)
    return {
        part.index: list(
            quantize_layer(
                model_map, part, None, names, _RTN, lambda m, n: assignment.formats[m.name] == n
            )
        )
        for part in parts
    }


def save_packed(
    model: nn.Module,
    folder: Path,
    assignment: Assignment | None = None,
    include: Sequence[str] = (),
) -> Path:
    """Write a packed checkpoint of a model.

    Args:
        model: from `tiny_model`, not changed.
        folder: directory to make.
        assignment: format of every matrix; None for `mixed_assignment`.
        include: what is packed beside the layers, names in `alphaquant.spaces.units.ENDS`.

    Returns:
        The folder.
    """
    model_map = map_model(model, include=include)
    with open_part(folder) as part:
        writer = CheckpointWriter(part.checkpoint)
        for index, items in quantize_mixed(model_map, assignment).items():
            writer.add_layer(index, items)
        writer.finish(model_map)
        writer.write_json("quantize_report.json", {"matrices": []})
        write_checksums(part.checkpoint)
        return part.place()


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
